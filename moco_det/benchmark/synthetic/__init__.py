"""Data sets drawn from a seed: `images` of shapes with boxes, `tasks` adds the other annotations.

They make every command run without a download, and tests know each pixel of them. Start with
`images`; both are commands too, `python -m moco_det.benchmark.synthetic.images --output DIR`.
"""
