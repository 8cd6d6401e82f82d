"""The decode loop: schedule, run, postprocess. Knows neither Triton nor an inference engine.

:mod:`~blipstream.decoding.request` says what goes in and comes out, :mod:`~blipstream.decoding.loop` serves it.
"""
