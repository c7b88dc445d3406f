#!/usr/bin/env sh
# Print where Chromium is; install Debian's package where there is none. VITREG_CHROMIUM names another one.
found=${VITREG_CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome)}
if [ -z "$found" ]; then
  if ! command -v apt-get >/dev/null 2>&1; then
    echo "the browser test needs Chromium, and there is no apt-get to install it: name one with VITREG_CHROMIUM=PATH" >&2
    exit 1
  fi
  as=
  if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      echo "the browser test needs Chromium, and installing it needs rights: sudo apt-get install chromium, or VITREG_CHROMIUM=PATH" >&2
      exit 1
    fi
    as="sudo -n"
  fi
  echo "installing Chromium for the browser test" >&2
  $as apt-get update -qq >&2 || true
  DEBIAN_FRONTEND=noninteractive $as apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1
  found=$(command -v chromium)
fi
if [ ! -x "$found" ]; then
  echo "the browser test needs Chromium, and apt-get could not install it: name one with VITREG_CHROMIUM=PATH" >&2
  exit 1
fi
echo "$found"
