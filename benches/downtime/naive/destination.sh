#!/bin/bash
# The migration that an operator would do by hand, at the destination: ADDRESS SOURCE.
set -euo pipefail
address=$1 source=$2

# Replies go back to where the clients' packets came from. Plain routes: a tunnel would only cost time.
sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0
ip route add default via "$source" table 100
ip rule add from "$address" lookup 100

busybox nc -l -p 4002 </dev/null >/tmp/flows &
flows=$!
busybox nc -l -p 4001 </dev/null >/var/tmp/incoming.tar &
archive=$!
until [[ $(ss -Hltn '( sport = 4001 or sport = 4002 )' | wc -l) == 2 ]]; do :; done
echo ready >&2

# Before the container runs: what it says first would be taken for a new connection and translated.
wait "$flows"
while read -r client client_port port; do
    conntrack -I -p tcp -s "$client" -d "$address" --sport "$client_port" --dport "$port" \
        -r "$address" -q "$client" --reply-port-src "$port" --reply-port-dst "$client_port" \
        --state ESTABLISHED --timeout 432000 -u SEEN_REPLY,ASSURED >/dev/null 2>&1
done </tmp/flows
wait "$archive"
podman container restore --import /var/tmp/incoming.tar --tcp-established --print-stats >/tmp/restore.json
: >"/dev/tcp/$source/4003"
rm /var/tmp/incoming.tar
printf '{"flows":%s,"restore":%s}\n' "$(wc -l </tmp/flows)" "$(cat /tmp/restore.json)"
