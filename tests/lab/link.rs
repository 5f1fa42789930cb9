//! The link between the first two hosts of a lab, broken and mended. `wan` is the lab's bridge.

use super::Node;

/// Nothing passes between the hosts. Clients reach both.
pub async fn cut(wan: &Node) {
    wan.sh("nft -f - <<END
table bridge fault {
    chain between {
        type filter hook forward priority filter;
        iifname h1 oifname h2 drop
        iifname h2 oifname h1 drop
    }
}
END")
        .await;
}

/// The link between the hosts drops one packet in 20 and sends as many twice, and what leaves it
/// waits in a queue of 20 Mbit/s: there is no netem on every kernel.
pub async fn spoil(wan: &Node) {
    wan.sh("nft -f - <<END
table bridge fault {
    chain between {
        type filter hook forward priority filter;
        iifname h1 oifname h2 numgen random mod 20 0 drop
        iifname h2 oifname h1 numgen random mod 20 0 drop
    }
}
table netdev fault {
    chain from1 {
        type filter hook ingress device h1 priority filter;
        ip daddr 10.77.0.12 numgen random mod 20 0 dup to h2
    }
    chain from2 {
        type filter hook ingress device h2 priority filter;
        ip daddr 10.77.0.11 numgen random mod 20 0 dup to h1
    }
}
END
for port in h1 h2; do tc qdisc add dev $port root tbf rate 20mbit burst 10kb latency 500ms; done")
        .await;
}

/// What leaves the link at either end waits in a queue of this rate, in tc(8)'s words.
pub async fn narrow(wan: &Node, rate: &str) {
    let narrow = format!(
        "for port in h1 h2; do tc qdisc add dev $port root tbf rate {rate} burst 64kb latency 50ms; done"
    );
    wan.sh(&narrow).await;
}

/// The link is as it was.
pub async fn mend(wan: &Node) {
    wan.sh("nft flush ruleset
        for port in h1 h2; do tc qdisc del dev $port root 2>/dev/null || true; done")
        .await;
}
