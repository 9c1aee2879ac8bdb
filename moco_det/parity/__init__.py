"""Do the two engines compute the same? Their detectors opened up, and compared number by number.

    probe        `EngineProbe`: what is measured of a detector, the same for both engines
    comparison   inputs to measure it on, and the table of differences

The two `Probe`s themselves belong to their engines (`native.engine.inference`, `plugin.probe`), and
`moco_det.engines.probe_class` finds them. Start at `tools/check_parity.py`.
"""
