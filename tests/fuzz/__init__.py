"""Damaged and hostile files through the real commands, in child processes with limits.

    python -m tests.fuzz --seconds 300              a table, and the distinct failures; exit code 1
                                                    where there is one
    python -m tests.fuzz --only json:17             one input again, with all that it printed
    python -m tests.fuzz --cases DIR                the folders that a maker of cases has written

An input is a function of its class and its number alone. `sandbox` runs a command in a fork of this
process, which has imported everything; `mutations` and `pickles` change bytes and values.
`weights`, `settings`, `annotations`, `folders` and `images` have the classes: whole files, what is
changed in them, the commands that meet them (`detection`: those of a data set) and what these must
make of them (`subjects`). `cases` drives named folders through the commands that they concern.
"""
