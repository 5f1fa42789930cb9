//! Hosts that can be stopped at a chosen point of Podman's work, or made to fail there.

use std::time::{Duration, Instant};

use super::{LOOK, Node};

/// Puts gates before the runtime and before CRIU: `/run/gate-VERB` makes `runc VERB` wait for as long as
/// the file is there, `/run/gate-criu` makes CRIU wait when it is to do something, and
/// `/run/gate-VERB.here`, with its process's number, says that somebody waits.
pub async fn install(host: &Node) {
    host.sh(r#"runc=$(readlink -f "$(command -v runc)")
        mv "$runc" "$runc.real"
        cat >"$runc" <<END
#!/bin/sh
case " \$* " in
*" --help "*) ;;
*" checkpoint "*) verb=checkpoint ;;
*" restore "*) verb=restore ;;
*" delete "*) verb=delete ;;
esac
if [ -n "\$verb" ] && [ -e /run/gate-\$verb ]; then
    echo \$\$ >/run/gate-\$verb.here
    while [ -e /run/gate-\$verb ]; do sleep 0.02; done
    rm -f /run/gate-\$verb.here
fi
exec "$runc.real" "\$@"
END
        criu=$(readlink -f "$(command -v criu)")
        mv "$criu" "$criu.real"
        cat >"$criu" <<END
#!/bin/sh
if [ "\$1" = swrk ]; then
    if [ -e /run/gate-criu ]; then
        echo \$\$ >/run/gate-criu.here
        while [ -e /run/gate-criu ]; do sleep 0.02; done
        rm -f /run/gate-criu.here
    fi
    [ ! -e /run/criu-fails ] || exit 1
fi
exec "$criu.real" "\$@"
END
        chmod 755 "$runc" "$criu""#)
        .await;
}

/// Whoever comes to this verb of the runtime from now on waits.
pub async fn close(host: &Node, verb: &str) {
    host.sh(&format!("rm -f /run/gate-{verb}.here; : >/run/gate-{verb}"))
        .await;
}

/// Nobody waits any more.
pub async fn open(host: &Node, verb: &str) {
    host.sh(&format!("rm -f /run/gate-{verb}")).await;
}

/// Waits until somebody waits.
pub async fn reached(host: &Node, verb: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !host.path(&format!("/run/gate-{verb}.here")).exists() {
        assert!(
            Instant::now() < deadline,
            "{} never came to {verb}",
            host.name()
        );
        tokio::time::sleep(LOOK / 2).await;
    }
}

/// Makes every use of CRIU on a host fail that is more than a look.
pub async fn break_criu(host: &Node) {
    host.sh(": >/run/criu-fails").await;
}

/// Makes it work again.
pub async fn mend_criu(host: &Node) {
    host.sh("rm /run/criu-fails").await;
}

/// Stops Podman's service, so that whatever asks it waits (STOP), or lets it go on (CONT), or ends it
/// (KILL).
pub async fn signal_podman(host: &Node, signal: &str) {
    host.sh(&format!("kill -{signal} $(cat /run/podman/service.pid)"))
        .await;
}
