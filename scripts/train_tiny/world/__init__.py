"""A small world of drawn scenes: what a tiny GLM-Image learns, and what its pictures are judged by.

``scene`` says what there is and deals it out, ``caption`` and ``edits`` say it in words, ``paraphrase`` in others,
``draw`` makes the pictures.
A caption tells the whole scene: what it leaves out is large, in the middle, on white, with its sign at the bottom.
"""
