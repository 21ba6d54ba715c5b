"""Where people are told things: results on stdout, the rest on stderr; every text as it is, never as markup."""

from rich.console import Console

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
