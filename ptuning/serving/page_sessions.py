"""The conversations of this page's process, by a name that stands in the page's address: a browser that loads the page anew
finds its own again, which Streamlit by itself forgets with the connection."""

import secrets
import threading
from collections import OrderedDict
from typing import Generic, TypeVar

MOST = 200  # conversations; the one that was unused longest makes room

Session = TypeVar("Session")


class Sessions(Generic[Session]):
    """Those that are kept. For any thread.

    Args:
        most: how many.
    """

    def __init__(self, most: int = MOST):
        self.most = most
        self._kept: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, session: Session) -> str:
        """Keeps one. Returns its name, which nobody can guess: there is no other lock on a conversation."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[name] = session
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return name

    def find(self, name: str | None) -> Session | None:
        """The one of this name; None where it isn't kept, or never was: names are given out here alone."""
        with self._lock:
            if name is None or name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return self._kept[name]
