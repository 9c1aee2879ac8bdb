"""Finished runs to tables, charts, pictures and pages.

Start with `tables`: a `Table` of `Row`s of `Cell`s, as it is printed in Markdown, CSV and JSON. The
two reports, `reproduction` and `quickstart`, read what their runs have left and write it as a page;
`pages` fills the templates, those of charts too, and draws what detectors found.

What runs, and in which folder, is said in `benchmark.jobs`; what a difference is worth in
`benchmark.significance`.
"""
