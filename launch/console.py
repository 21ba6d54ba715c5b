"""Where people are told things: results on stdout, the rest on stderr; every text as it is, never as markup."""

from flowmask.models.safe.words import PlainConsole

out = PlainConsole()
err = PlainConsole(stderr=True)
