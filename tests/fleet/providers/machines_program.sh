#!/bin/sh
# A program for the command provider whose cloud is a directory: every machine is a file, and tests write others.
#
#     machines_program.sh DIRECTORY VERB
#
# NAME.FLEET.machine is the line of a machine; capacity, how many there may be; fails, the exit code of the next request;
# loses lets the next request carry out what it is asked, and then fail; calls is what was called.
set -eu
cd "$1"
echo "$2 ${SPOTJAX_NAME-}" >> calls

fail() {
    printf 'details\n%s\n' "$2" >&2
    exit "$1"
}

request() { # does not look whether there is one: the provider does
    if [ -e fails ]; then
        read -r code < fails || true
        rm fails
        fail "$code" "as it was told: $code"
    fi
    set -- *.machine
    if [ -e capacity ] && [ -e "$1" ] && [ $# -ge "$(cat capacity)" ]; then fail 10 "no machines left"; fi
    set -C # a second one of that name is an error
    printf '{"name":"%s","type":"%s","zone":"%s","price_class":"%s","state":"running","detail":"%s","created":7.0}\n' \
        "$SPOTJAX_NAME" "$SPOTJAX_TYPE" "$SPOTJAX_ZONE" "$SPOTJAX_PRICE_CLASS" "$SPOTJAX_JOIN" \
        > "$SPOTJAX_NAME.$SPOTJAX_FLEET.machine"
    if [ -e loses ]; then
        rm loses
        fail 75 "the line was cut"
    fi
    cat "$SPOTJAX_NAME.$SPOTJAX_FLEET.machine"
}

case $2 in
offers)
    echo '{"type":"big","zone":"a","price":1.5}'
    echo '{"type":"big","zone":"a","price_class":"on_demand","price":4}'
    ;;
list)
    for machine in *."$SPOTJAX_FLEET".machine; do
        if [ -e "$machine" ]; then cat "$machine"; fi
    done
    ;;
request) request ;;
release) rm -f "$SPOTJAX_NAME.$SPOTJAX_FLEET.machine" ;;
*) fail 2 "$2 is not known" ;;
esac
