# Images of real programs, made of the distribution's packages, and their clients. Read by `lab`.
#
# An image holds a program, the libraries that it opens, its configuration and a shell, and nothing
# else: hosts load it in less than a second, and what CRIU has to move is what the package ships.

# What hosts can be given with `up --with NAME`, beside the workload's image.
readonly PROGRAMS=(iperf3 redis postgresql nginx)
# The packages that are not among the hosts' own. They are unpacked, not installed.
readonly PROGRAM_PACKAGES=(base-files redis-server redis-tools postgresql nginx)
# Part of the caches' keys: raise it when the way something is built changes.
readonly IPERF3_VERSION=4
readonly PROGRAMS_VERSION=3
# Who owns the database, by the numbers that Debian gives first.
readonly POSTGRES=101:101

iperf3_dir() { printf '%s/iperf3-%s' "$CACHE" "$(printf '%s ' "$IPERF3_VERSION" "$(rootfs_dir)" | hash_of)"; }
programs_dir() { printf '%s/programs-%s' "$CACHE" "$(printf '%s ' "$PROGRAMS_VERSION" "$(rootfs_dir)" "${PROGRAM_PACKAGES[@]}" | hash_of)"; }

# Where the image of a program is, as image.tar.
program_dir() {
    case $1 in
    iperf3) iperf3_dir ;;
    redis | postgresql | nginx) printf '%s/%s' "$(programs_dir)" "$1" ;;
    *) die "there is no image of $1 (there are: ${PROGRAMS[*]})" ;;
    esac
}

# Where clients find the programs that they run.
client_path() { printf '%s:%s:%s/client/bin' "$(image_dir)" "$(iperf3_dir)/client/bin" "$(programs_dir)"; }

# What there is in TREE, by the names that it has there: in_tree TREE PATTERN
in_tree() { (cd "$1" && printf '/%s\n' ${2#/}); }

# Copies files out of TREE, with the libraries that they are linked to: copy_program TREE TO FILE...
copy_program() {
    local tree=$1 to=$2 loader file
    shift 2
    loader=$(in_tree "$tree" '/lib*/ld-linux*.so.*' | head -n1)
    # Lines of the loader: "name => path (address)", and its own, "path (address)". A plug-in finds
    # some of its libraries only in the program that opens it.
    for file in "$@" $(for file in "$@"; do
        chroot "$tree" "$loader" --list "$file" 2>/dev/null | grep -o '/[^ ]*' || true
    done | sort -u); do
        mkdir -p "$to$(dirname "$file")"
        cp --dereference "$tree$file" "$to$file"
    done
}

# Makes programs of TREE usable on clients, which have the machine's file system and so other
# libraries: client_programs TREE DIR PROGRAM..., where DIR is named as it will be at last.
client_programs() {
    local tree=$1 dir=$2 tmp=$3 program loader
    shift 3
    mkdir -p "$tmp/client/bin" "$tmp/client/files"
    for program in "$@"; do
        copy_program "$tree" "$tmp/client/files" "$program"
    done
    # All in one place, for the loader.
    find "$tmp/client/files" -type f -exec mv -t "$tmp/client" {} +
    rm -r "$tmp/client/files"
    loader=$(basename "$tmp"/client/ld-*.so.*)
    for program in "$@"; do
        program=$(basename "$program")
        printf '#!/bin/sh\nexec "%s" --library-path "%s" "%s" "$@"\n' \
            "$dir/client/$loader" "$dir/client" "$dir/client/$program" >"$tmp/client/bin/$program"
        chmod +x "$tmp/client/bin/$program"
    done
}

# An empty tree for an image, with a shell: image_tree ROOTFS DIR
image_tree() {
    mkdir -p "$2"/{bin,tmp,proc,sys,dev,etc,run,data}
    chmod 1777 "$2/tmp"
    cp "$1/usr/bin/busybox" "$2/bin/busybox"
    ln -s busybox "$2/bin/sh"
    printf 'root:x:0:0:root:/:/bin/sh\npostgres:x:%s:postgres:/data:/bin/sh\n' "$POSTGRES" >"$2/etc/passwd"
    printf 'root:x:0:\npostgres:x:%s:\n' "${POSTGRES#*:}" >"$2/etc/group"
}

build_iperf3_image() {
    local dir=$1 rootfs=$2 tmp=$1.tmp library
    say "building the iperf3 image in $dir"
    rm -rf "$tmp"
    mkdir -p "$tmp/archive"
    image_tree "$rootfs" "$tmp/base"
    copy_program "$rootfs" "$tmp/base" /usr/bin/iperf3
    # What the C library opens by itself when a thread is cancelled, which iperf3 does at the end of
    # each test.
    library=$(in_tree "$rootfs" '/usr/lib/*/libgcc_s.so.1')
    cp --dereference "$rootfs$library" "$tmp/base$library"
    layer_of "$tmp/base" "$tmp/archive/base.tar"
    pack_image "$tmp" localhost/iperf3:latest /usr/bin/iperf3 base
    client_programs "$rootfs" "$dir" "$tmp" /usr/bin/iperf3
    cp --dereference "$rootfs$library" "$tmp/client/"
    rm -rf "$tmp/base" "$dir"
    mv -T "$tmp" "$dir"
}

build_program_images() {
    local dir=$1 rootfs=$2 tmp=$1.tmp tree=$1.tmp/tree
    say "building the images of ${PROGRAMS[*]:1} in $dir: half a minute, once"
    rm -rf "$tmp"
    mkdir -p "$tmp"
    bootstrap extract "$tree" "${PROGRAM_PACKAGES[@]}"
    redis_image "$rootfs" "$tree" "$tmp/redis"
    postgresql_image "$rootfs" "$tree" "$tmp/postgresql"
    nginx_image "$rootfs" "$tree" "$tmp/nginx"
    client_programs "$tree" "$dir" "$tmp" /usr/bin/redis-cli /usr/bin/redis-benchmark \
        "$(postgresql_in "$tree")"/bin/{psql,pgbench}
    rm -rf "$tree" "$dir"
    mv -T "$tmp" "$dir"
}

redis_image() {
    local rootfs=$1 tree=$2 tmp=$3
    mkdir -p "$tmp/archive"
    image_tree "$rootfs" "$tmp/base"
    copy_program "$tree" "$tmp/base" /usr/bin/redis-server
    layer_of "$tmp/base" "$tmp/archive/base.tar"
    pack_image "$tmp" localhost/redis:latest /usr/bin/redis-server base
    rm -rf "$tmp/base"
}

# The directory of the one version that was unpacked.
postgresql_in() { in_tree "$1" '/usr/lib/postgresql/*'; }

# With an empty database in /data/pg, as `initdb` makes it: that takes longer than a test.
postgresql_image() {
    local rootfs=$1 tree=$2 tmp=$3 at
    at=$(postgresql_in "$tree")
    mkdir -p "$tmp/archive"
    image_tree "$rootfs" "$tmp/base"
    # The compiler of queries is left out: it is a hundred megabytes and has nothing to do here.
    copy_program "$tree" "$tmp/base" "$at"/bin/{postgres,initdb,pg_amcheck} \
        $(in_tree "$tree" "$at/lib/*.so" | grep -v llvm)
    mkdir -p "$tmp/base/usr/share/postgresql"
    cp -r "$tree/usr/share/postgresql/." "$tmp/base/usr/share/postgresql/"
    cp -r "$tree/usr/share/zoneinfo" "$tmp/base/usr/share/"
    # initdb starts the server through the shell, and wants somewhere to put shared memory.
    mkdir "$tmp/base/dev/shm"
    chmod 1777 "$tmp/base/dev/shm"
    cp -a "$tree"/dev/{null,zero,urandom} "$tmp/base/dev/"
    chown "$POSTGRES" "$tmp/base/data"
    # Checksums: a page that came over half is found when it is read.
    chroot --userspec="$POSTGRES" "$tmp/base" "$at/bin/initdb" --pgdata=/data/pg --username=postgres --auth=trust \
        --encoding=UTF8 --locale=C --data-checksums --no-sync >"$tmp/initdb.log" 2>&1 ||
        die "initdb: $(tail -n 5 "$tmp/initdb.log")"
    rm -r "$tmp/base/dev"
    mkdir "$tmp/base/dev"
    not_root "$tmp/base/not-root.so"
    printf 'host all all all trust\n' >>"$tmp/base/data/pg/pg_hba.conf"
    mkdir -p "$tmp/top"
    mv "$tmp/base/data" "$tmp/top/data"
    layer_of "$tmp/base" "$tmp/archive/base.tar"
    layer_of "$tmp/top" "$tmp/archive/top.tar" "$POSTGRES"
    pack_image "$tmp" localhost/postgresql:latest "$at/bin/postgres" base top
    rm -rf "$tmp"/{base,top,initdb.log}
}

# The server does not run as root. Where root lacks CAP_SYS_RESOURCE, CRIU can dump nobody else: there
# it is told, by way of LD_PRELOAD, that it is not root.
not_root() {
    gcc -shared -fPIC -O -x c -o "$1" - <<END
#include <sys/types.h>
uid_t getuid(void) { return ${POSTGRES%:*}; }
uid_t geteuid(void) { return ${POSTGRES%:*}; }
END
}

# Serves files whose every line is made of the file's own name and the line's number.
nginx_image() {
    local rootfs=$1 tree=$2 tmp=$3 size
    mkdir -p "$tmp/archive"
    image_tree "$rootfs" "$tmp/base"
    copy_program "$tree" "$tmp/base" /usr/sbin/nginx
    mkdir -p "$tmp"/base/{etc/nginx,var/log/nginx,var/lib/nginx,srv}
    cat >"$tmp/base/etc/nginx/nginx.conf" <<'END'
daemon off;
user root root;
worker_processes 2;
pid /run/nginx.pid;
error_log stderr;
events { worker_connections 512; }
http {
    access_log /var/log/nginx/access.log;
    keepalive_timeout 300s;
    keepalive_requests 1000000;
    server {
        listen 8080;
        root /srv;
    }
}
END
    for size in 1 100 10000 1000000; do
        awk -v n="$size" 'BEGIN { for (i = 1; i <= n; i++) printf "%d of %d\n", i, n }' >"$tmp/base/srv/$size"
    done
    layer_of "$tmp/base" "$tmp/archive/base.tar"
    pack_image "$tmp" localhost/nginx:latest /usr/sbin/nginx base
    rm -rf "$tmp/base"
}
