#!/bin/bash
# The floor: CONTAINER, which Podman runs, is checkpointed and restored where it is, by runc alone.
#
# It is the very container that the engines move: its processes, its bundle, its mounts, its network
# with the published port and the client's connection. Left out is everything that moves it: Podman,
# the network between the hosts, and whoever sends its memory from here to there. Images and work files
# are in two directories of a tmpfs.
set -euo pipefail
container=$1
read -r id conmon config namespace address hardware < <(podman inspect --format \
    '{{.Id}} {{.State.ConmonPid}} {{.OCIConfigPath}} {{.NetworkSettings.SandboxKey}} {{range .NetworkSettings.Networks}}{{.IPAddress}} {{.MacAddress}}{{end}}' \
    "$container")
cgroup=/sys/fs/cgroup/libpod_parent/libpod-$id
# "2: eth0@if4: ...": the other end's number.
link=$(nsenter --net="$namespace" ip -o link show eth0 | sed 's/.*eth0@if\([0-9]*\):.*/\1/')
port=$(ip -o link | sed -n "s/^$link: \([^@:]*\).*/\1/p")
mkdir /run/floor
mount -t tmpfs floor /run/floor
mkdir /run/floor/images /run/floor/work
# CRIU need not hold the packets: they are held (see below).
printf 'network-lock skip\n' >/run/floor/criu.conf
export CRIU_CONFIG_FILE=/run/floor/criu.conf
where=(--image-path /run/floor/images --work-path /run/floor/work)

# Conmon would tell Podman that the container has ended, and Podman would take its network away.
kill -STOP "$conmon"

# The client's packets wait and none is dropped, or else its retransmission timer would be part of the
# gap and the floor look higher than it is: the kernel keeps what has to be resolved before it can be
# sent, and the question is not let out.
nft "table arp floor { chain output { type filter hook output priority 0; arp daddr ip $address drop; }; }"
echo 100000 >/proc/sys/net/ipv4/neigh/podman0/mcast_solicit
echo 4000000 >/proc/sys/net/ipv4/neigh/podman0/unres_qlen_bytes

began=$EPOCHREALTIME
ip neigh del "$address" dev podman0
# CRIU alone would look every 100 ms whether all has stopped.
echo 1 >"$cgroup/cgroup.freeze"
# The frozen container's kernel goes on repeating what was not acknowledged, and a later timestamp than
# the restored one's would make the client deaf to that for a while. So nobody hears it.
bridge link set dev "$port" state 0
before=$EPOCHREALTIME
runc checkpoint --tcp-established "${where[@]}" "$id"
dumped=$EPOCHREALTIME
bridge link set dev "$port" state 3
between=$EPOCHREALTIME
runc restore --detach --tcp-established --bundle "${config%/*}" "${where[@]}" "$id" </dev/null >/dev/null 2>&1
restored=$EPOCHREALTIME
ip neigh replace "$address" lladdr "$hardware" dev podman0 nud reachable

micros() { echo $((${2/./} - ${1/./})); }
printf '{"checkpoint_us":%s,"restore_us":%s,"frozen_us":%s,"image_bytes":%s}\n' \
    "$(micros "$before" "$dumped")" "$(micros "$between" "$restored")" "$(micros "$began" "$restored")" \
    "$(du -sb /run/floor/images | cut -f1)"
