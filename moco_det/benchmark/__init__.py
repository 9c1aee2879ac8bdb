"""Whole experiments, from images or checkpoints to a table whose numbers can be trusted.

`jobs` says what is run, runs it, and knows each run's folder; `significance` says what a difference
of means is worth; `report` turns finished runs into tables and pages; `synthetic` draws the data of
runs that need no download; `speed` and `pretrain_step` time what we do beside a reference, and
`cost` measures a step for Table 3 of MoCo v2. Start with `jobs.reproduction`. The only room besides
the tools that uses both `pretrain` and `moco_det`; how anything is trained or evaluated is said
there, not here.
"""
