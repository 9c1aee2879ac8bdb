"""The checkpoints of a run: kept whole through a full disk and a kill, and found again."""

from pathlib import Path

from moco_det.common.errors import UserError
from moco_det.common.files import write_text
from moco_det.weights.files import read_state_dict, write_weights


class Checkpoints:
    """The `.pth` files of one OUTPUT_DIR; the text file `last_checkpoint` names the newest.

    Names and layout are Detectron2's. Each file is written beside its destination and renamed, so
    that a reader, and a run that was killed, only ever find whole ones.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._tag = self.folder / "last_checkpoint"

    def last(self) -> Path | None:
        """The newest checkpoint, or None where nothing was saved yet."""
        return self.folder / self._tag.read_text().strip() if self._tag.is_file() else None

    def save(self, name: str, content: dict) -> Path:
        """Write `{name}.pth` and make it the last one. For one process of a run only.

        Raises:
            UserError: it cannot be written (a full disk); the previous checkpoint is intact.
        """
        path = self.folder / f"{name}.pth"
        previous = self.last()
        try:
            write_weights(path, content)
        except UserError as error:
            kept = (
                f"the previous checkpoint, {previous}, is intact" if previous else "none is saved"
            )
            raise UserError(f"{error}; {kept}") from error
        write_text(self._tag, path.name)
        return path

    @staticmethod
    def load(path: Path) -> dict:
        """What `save` was given, its tensors on the CPU.

        Raises:
            UserError: the file is missing, damaged, or not a checkpoint of a training run.
        """
        model, rest = read_state_dict(path)
        missing = {"optimizer", "scheduler", "iteration"} - rest.keys()
        if missing:
            raise UserError(f"cannot resume from {path}: it lacks {', '.join(sorted(missing))}")
        return {"model": model, **rest}
