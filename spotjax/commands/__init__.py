"""The commands of the ``spotjax`` command line. Heavy imports happen when one runs, so that ``--help`` is quick."""
