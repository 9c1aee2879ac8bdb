"""What pretraining and detection both stand on; it imports nothing else of the project.

Only what both sides use belongs here: the processes of a run and their launch, errors and exit
codes, files written whole or not at all, the checked reader of checkpoints (`checkpoint_files.py`)
and the schema of what a run resumes from (`resume_state.py`), ResNet shapes, where weights come
from (`weight_sources.py`) and how their arrays are called (`weight_layouts.py`). Start with
`errors.py`: a `UserError` is what a user can put right, and only a command turns it into an exit
code.
"""
