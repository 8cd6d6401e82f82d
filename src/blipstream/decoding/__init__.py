"""The decode loop: schedule, run, postprocess. Knows neither Triton nor an inference engine."""
