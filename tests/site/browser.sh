#!/usr/bin/env bash
# Make sure that there is a browser for the browser tests: one that is installed, else Debian's, else Playwright's own.
set -euo pipefail
cd "$(dirname "$0")/../.."

for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
  command -v "$name" >/dev/null && exit 0
done
[ -x "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" ] && exit 0
[ -n "$(find "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}" -maxdepth 1 -name 'chromium*' 2>/dev/null)" ] && exit 0

if [ -f /etc/debian_version ] && command -v apt-get >/dev/null; then
  root=""
  [ "$(id -u)" = 0 ] || root="sudo -n"
  if [ -z "$root" ] || sudo -n true 2>/dev/null; then
    echo "installing chromium with apt" >&2
    if $root apt-get update -qq && $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; then
      command -v chromium >/dev/null && exit 0  # on Ubuntu the package is a stub for a snap
    fi
  fi
fi
echo "installing chromium with playwright" >&2
.venv/bin/python -m playwright install chromium
