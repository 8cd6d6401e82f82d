"""Full-size models: Blipstream against everything else that runs them on a CPU, each in an environment of its own."""
