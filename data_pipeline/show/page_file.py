"""The one HTML file that a command writes: complete or not at all; it replaces only an earlier page of its kind."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowmask.data_pipeline.show import page
from flowmask.models.errors import ConfigError, UserError
from flowmask.models.files import move_new
from flowmask.models.folders.scratch import scratch


@dataclass(frozen=True)
class PageFile:
    """The file that --out names.

    title: the beginning of the titles of all pages of this kind; kind: the subject of the page, with its article
    error: raised if the disk refuses
    """

    out: Path
    title: str
    kind: str
    error: type[UserError] = ConfigError

    def refuse(self) -> None:
        """ConfigError in one line if `out` is a folder, or a file that is no page of this kind."""
        if self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a folder; name a file, for example {self.out / 'page.html'}")
        with self._said():
            self._refuse_other_file()

    def write(self, named: str, body: Sequence[str]) -> None:
        """Write the page `<title> <named>`."""
        with self._said():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with scratch(self.out.parent) as place:
                made = place / self.out.name
                made.write_text(page.document(f"{self.title} {named}", body), encoding="utf-8")
                self._refuse_other_file()
                made.replace(self.out) if self.out.exists() else move_new(made, self.out)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Raises a refusal of the disk as one line."""
        try:
            yield
        except OSError as error:
            raise self.error(f"cannot write {self.out}: {error.strerror}; choose another --out") from error

    def _refuse_other_file(self) -> None:
        if not os.path.lexists(self.out):
            return
        begins = (page.document(self.title, []).partition(f"{self.title}<")[0] + self.title).encode()
        if self.out.is_file() and not self.out.is_symlink():
            with self.out.open("rb") as file:
                if file.read(len(begins)) == begins:
                    return
        raise ConfigError(f"--out {self.out} is there and no page of {self.kind}; remove it, or name another file")
