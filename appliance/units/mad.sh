#!/bin/sh
# Written by microauthd install: the operator's command line.
exec @PYTHON@ -I @PREFIX@/microauthd.pyz mad "$@"
