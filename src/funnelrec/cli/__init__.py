"""The command line; its words are in app.py, what they do in fit.py and demo.py."""
