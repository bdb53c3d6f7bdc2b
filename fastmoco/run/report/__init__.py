"""The report of runs: one page of HTML that needs no network, from the folders of runs."""
