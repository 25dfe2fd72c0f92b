"""What the screens share: the fields of the form, the panels that show something, and the jobs.

A screen adds fields and panels. A panel is a pure function of the form, called again by the timer and after each change
of a field; only what has changed is sent to the browser.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlft.errors import VlftError
from vlft.pages.web import render
from vlft.ui.commands import Form
from vlft.ui.jobs import Job, Jobs, stop
from vlft.ui.runs import Runs
from vlft.ui.words import spoken

STATE = re.compile(r'class="state ([a-z ]*)"')
LOG = logging.getLogger("vlft")
_TOLD: set[str] = set()  # faults that were logged: a panel is drawn every two seconds


@dataclass(frozen=True)
class Kept:
    """Stands for what a component shows already."""


KEPT = Kept()


@dataclass(frozen=True, kw_only=True)
class Choices:
    """New choices of a drop-down list, in place of a value."""

    choices: tuple[str, ...]

    @classmethod
    def around(cls, chosen: Sequence[str], *found: str) -> Choices:
        """Return what was found, with what is chosen: a list must not lose an entry that is in use."""
        return cls(choices=tuple(dict.fromkeys((*found, *(one for one in chosen if one)))))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Components and what they show.

    Attributes:
        outputs: components of Gradio.
        view: form -> one value for each of them.
    """

    outputs: Sequence[Any]
    view: Callable[[Form], Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Action:
    """A button and what it does.

    Attributes:
        button: component of Gradio.
        work: form -> new values of fields, by name.
        message: component for an error or a note.
        sets: names of the fields that it may set.
        done: the note after success.
        about: component of a panel that shows the state of a job. The message ends when that state changes.
    """

    button: Any
    work: Callable[[Form], Mapping[str, Any]]
    message: Any
    sets: tuple[str, ...] = ()
    done: str = ""
    about: Any = None


@dataclass(kw_only=True)
class Desk:
    """The page while it is built, and what its functions need afterwards.

    Attributes:
        jobs: verbs that were started here.
        runs: run folders that somebody looks at.
        folder: the folder that is open at first.
        fields: name in the form -> component.
        panels, actions: in the order in which the screens added them.
    """

    jobs: Jobs
    runs: Runs
    folder: str
    fields: dict[str, Any] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)

    def add(self, **fields: Any) -> Any:
        """Add fields of the form; returns the last one."""
        self.fields.update(fields)
        return [*fields.values()][-1]

    def drawn(self, html: str = "") -> Any:
        """Add a place for HTML of vlft, which has a style of its own."""
        import gradio as gr

        return gr.HTML(html, padding=False, apply_default_css=False)

    def panel(self, outputs: Sequence[Any], view: Callable[[Form], Sequence[Any]]) -> None:
        """Show something that follows from the form."""
        self.panels.append(Panel(outputs=outputs, view=view))

    def action(
        self,
        button: Any,
        work: Callable[[Form], Mapping[str, Any] | None],
        message: Any,
        *sets: str,
        done: str = "",
        about: Any = None,
    ) -> None:
        """Let a button do something."""
        self.actions.append(
            Action(
                button=button, work=lambda form: work(form) or {}, message=message, sets=sets, done=done, about=about
            )
        )

    def stop_button(self) -> Any:
        """Add a button for `stopping`. `ui.css` shows it while its screen shows a running job."""
        import gradio as gr

        return gr.Button("Stop", variant="stop", elem_classes="stopping")

    def stopping(self, button: Any, jobs: Callable[[Form], Sequence[Job | None]], message: Any, about: Any) -> None:
        """Let a button stop jobs."""

        def work(form: Form) -> None:
            for job in jobs(form):
                if job is not None:
                    stop(job)

        self.action(button, work, message, about=about)

    def form(self, values: Sequence[Any]) -> Form:
        """Return the form from the values of the fields, in their order."""
        return located(Form.of(dict(zip(self.fields, values, strict=True))), self.folder)

    def view(self, form: Form) -> list[Any]:
        """Return what every panel shows, in order."""
        return [_sent(value) for panel in self.panels for value in _shown(panel, form)]

    def act(self, action: Action, form: Form) -> tuple[str, dict[str, Any]]:
        """Do what a button does. Returns the message as HTML, and new values of fields."""
        new: dict[str, Any] = {}
        try:
            new = dict(action.work(form))
            text, kind = action.done, "good"
        except VlftError as error:
            text, kind = spoken(str(error)), "bad"
        except OSError as error:
            text, kind = f"{error.filename or 'a file'}: {error.strerror or error}", "bad"
        except Exception as error:  # noqa: BLE001 - a bug in vlft: the page stays, and says so
            text, kind = _bug(error), "bad"
        return message(text, kind, now=time.time_ns()), new


def _shown(panel: Panel, form: Form) -> Sequence[Any]:
    """What a panel shows; an error stays in its own panel, and leaves lists of choices as they are."""
    try:
        return panel.view(form)
    except VlftError as error:
        fault = message(spoken(str(error)), "bad")
    except OSError as error:
        fault = message(f"{error.filename or 'a file'}: {error.strerror or error}", "bad")
    except Exception as error:  # noqa: BLE001 - a bug in vlft must not stop the other panels
        fault = message(_bug(error), "bad")
    values = [*[""] * (len(panel.outputs) - 1), fault]
    return [KEPT if hasattr(one, "choices") else value for one, value in zip(panel.outputs, values, strict=True)]


def _bug(error: Exception) -> str:
    """Log an error that no user can fix, once, and return a line about it."""
    text = f"{type(error).__name__}: {error}"
    if text not in _TOLD and len(_TOLD) < 100:
        _TOLD.add(text)
        LOG.error("vlft ui: a part of the page failed", exc_info=error)
    return (
        f"This part of the page failed: {text[:200]}. The terminal of vlft ui shows where. The other parts still work."
    )


def _sent(value: Any) -> Any:
    """Return a value that JSON can hold: lone surrogates become `?`."""
    if isinstance(value, Choices):
        return Choices(choices=tuple(map(_sent, value.choices)))
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def message(text: str, kind: str = "good", *, now: int = 0) -> str:
    """Return a line for the user as HTML.

    Args:
        now: differs between messages of the same text. The browser hides a message as soon as the user does something
            else, and shows it again only if it is another one.
    """
    return render("ui_message.html.j2", title="", text=text, kind=kind, now=now)


def state_of(html: Any) -> list[str]:
    """Return the states of the jobs and runs that HTML of a panel shows."""
    return STATE.findall(html) if isinstance(html, str) else []


def located(form: Form, folder: str) -> Form:
    """Return the form with absolute paths, so that a copied command line works in any folder.

    Args:
        form: as typed; relative paths are in its folder.
        folder: its folder if it has none.
    """
    here = absolute(form.folder, folder) or folder
    model = absolute(form.model, here)
    return replace(
        form,
        folder=here,
        data=tuple(absolute(path, here) for path in form.data),
        eval=tuple(absolute(path, here) for path in form.eval),
        images=absolute(form.images, here),
        model=model if os.path.isdir(model) else form.model,
        row_file=absolute(form.row_file, here),
    )


def absolute(path: str, folder: str) -> str:
    """Return a path as the commands use it: a relative one is in the open folder."""
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path))) if path else ""
