#!/bin/bash
# The migration that an operator would do by hand, at the source: CONTAINER ADDRESS DESTINATION OWN.
# What runs at the destination meanwhile is destination.sh. Every step begins as soon as it can, and
# nothing sleeps; the only wait that is not a command's own is for the destination's word.
set -euo pipefail
container=$1 address=$2 destination=$3
archive=/var/tmp/$container.tar

# Before anything stops: somebody listens for "it runs"; no redirects once this host is a detour.
busybox nc -l -p 4003 </dev/null >/dev/null &
runs=$!
sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0

# Not a reject: clients are to send it again.
nft add table ip naive
nft -f - <<END
table ip naive {
    chain forward {
        type filter hook forward priority filter - 5; policy accept;
        ip daddr $address drop
    }
}
END
# The flows, in the form in which the destination enters them. Beside the checkpoint, which takes longer.
{
    conntrack -L -p tcp --reply-src "$address" 2>/dev/null |
        sed -n 's/.*ESTABLISHED src=\([^ ]*\) dst=[^ ]* sport=\([0-9]*\) dport=[0-9]* src=[^ ]* dst=[^ ]* sport=\([0-9]*\) .*/\1 \2 \3/p' \
            >"/dev/tcp/$destination/4002"
} &
frozen=$EPOCHREALTIME
# Stopped, so that nothing of it speaks up later; not compressed, which a local network does not need.
podman container checkpoint --export "$archive" --compress none --tcp-established --print-stats "$container" >/tmp/checkpoint.json
cat "$archive" >"/dev/tcp/$destination/4001"
wait "$runs"
thawed=$EPOCHREALTIME
# The binding stays as it is; only the way behind it is another.
ip route add "$address/32" via "$destination"
nft delete table ip naive

podman rm "$container" >/dev/null
bytes=$(stat -c %s "$archive")
rm "$archive"
printf '{"bytes_sent":%s,"frozen_us":%s,"checkpoint":%s}\n' "$bytes" "$((${thawed/./} - ${frozen/./}))" \
    "$(cat /tmp/checkpoint.json)"
