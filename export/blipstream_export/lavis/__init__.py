"""Checkpoints in LAVIS's layout: the trained part, the frozen ViT and the language model lie apart, and are composed.

LAVIS (github.com/salesforce/LAVIS) is the original code of BLIP-2 and InstructBLIP. It stores what was trained in a
``.pth`` file and takes the rest from elsewhere. What is said of it in this package was read in its source:
``lavis/models/blip2_models``, ``lavis/models/eva_vit.py`` and ``lavis/models/clip_vit.py``.
"""
