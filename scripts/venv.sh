# Sourced by the other scripts: `venv FILE` makes .venv and installs a requirements file into it, once.
# A second call is quick: the file's checksum is kept beside what was installed from it.
venv() {
    local file=$1 stamp sum
    stamp=.venv/installed-$(basename "$file")
    sum=$(cat requirements.txt "$file" | cksum)
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv || return
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
        echo "installing $file into .venv" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file" >&2 || return
        echo "$sum" >"$stamp"
    fi
}
