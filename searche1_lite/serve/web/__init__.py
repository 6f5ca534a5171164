"""`ask --web`: the session of `ask` as a page on loopback.

`app.py` is what the server serves, `desk.py` answers one question after the other; `page.js` shows it.
"""
