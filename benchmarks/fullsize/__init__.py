"""Full-size models with random weights: what it takes to build them, and how fast one caption is."""
