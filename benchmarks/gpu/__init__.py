"""``make gpu``: all that can be tested and measured on this machine's GPU, part by part, as one report.

The parts run in processes of their own. What each needs, how long it may take and what it costs to repeat is in
:mod:`benchmarks.gpu.parts`; how one is run, in :mod:`benchmarks.gpu.runner`; what the report says, in
:mod:`benchmarks.gpu.report`.
"""
