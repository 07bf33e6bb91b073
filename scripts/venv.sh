# Sourced by the other scripts: `venv FILE` makes .venv and installs a requirements file into it, once.
# A second call is quick: the file's checksum is kept beside what was installed from it.
venv() {
    local file=$1 stamp sum
    stamp=.venv/installed-$(basename "$file")
    sum=$(cat requirements.txt "$file" | cksum)
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # not there, or its making was interrupted
        echo "making .venv" >&2
        "${PYTHON:-python3}" -m venv --clear .venv || return
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
        echo "installing $file into .venv: about 2.4 GB, a minute or more; once" >&2
        .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r "$file" |
            sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing collected.*/  installing what was fetched/p' >&2 || return
        echo "$sum" >"$stamp"
    fi
}
