#!/bin/sh
# What the tests in a browser and the test of LaTeX need and Python's index does not have. Argument: a folder for axe-core.
set -eu
missing=""
command -v chromium >/dev/null || missing="$missing chromium"
command -v pdflatex >/dev/null || missing="$missing texlive-latex-recommended"
command -v npm >/dev/null || missing="$missing npm"
if [ -n "$missing" ]; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    $as_root apt-get update -qq
    # shellcheck disable=SC2086  # a list of packages
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing
fi
[ -f "$1/node_modules/axe-core/axe.min.js" ] || npm install --loglevel=error --no-audit --no-fund --prefix "$1" axe-core@4.14.1
