"""The page's modules, imported as Streamlit does it: from their own folder, so that there is one copy of each."""

import sys

from tests.conftest import REPO

FOLDER = REPO / "ptuning" / "serving"

sys.path.insert(0, str(FOLDER))
try:
    import page_client as client
    import page_history as history
    import page_job as job
    import page_sessions as sessions
    import page_texts as texts
finally:
    sys.path.remove(str(FOLDER))

__all__ = ["FOLDER", "client", "history", "job", "sessions", "texts"]
