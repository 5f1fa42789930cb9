//! From host to host and back: paths stay as short as they can be.

mod lab;

use lab::Lab;
use lab::pair::Pair;
use serde_json::Value;

/// Panics unless all the connections of an echo client went on, with nothing wrong.
#[track_caller]
fn assert_went_on(report: &Value, connections: u64) {
    assert_eq!(report["connected"], connections, "{report}");
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["resets"], 0, "{report}");
    assert_eq!(report["unanswered"], 0, "{report}");
    assert_eq!(report["same_socket"], true, "{report}");
}

/// Hosts whose kernels soon forget a connection that has ended; else it takes two minutes.
async fn forgetful(hosts: usize, clients: usize) -> Pair {
    let pair = Pair::of(Lab::builder(hosts).clients(clients)).await;
    for host in 1..=hosts {
        let time_wait = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait";
        pair.host(host).sh(&format!("echo 1 >{time_wait}")).await;
    }
    pair
}

#[tokio::test]
async fn back_home_nothing_is_in_the_way() {
    let ports = ["-p", "7000:7000"];
    let pair = forgetful(2, 2).await;
    pair.host(1)
        .run_workload("web", &ports, &["echo", "7000"])
        .await;
    let (at_h1, at_h2) = (pair.host(1).ip(), pair.host(2).ip());
    let first = pair
        .client(1)
        .spawn(&["client-echo", &at_h1, "7000", "--connections", "3"])
        .await;
    let there = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &there).await;
    let second = pair
        .client(2)
        .spawn(&["client-echo", &at_h2, "7000", "--connections", "2"])
        .await;

    let back = pair.migrate("web", 2, 1).await;
    pair.assert_moved("web", 2, 1, &back).await;
    // Those that began at the second host come through it, and there is a hop as long as they live.
    pair.host(1).sh("ip link show livemig1").await;
    assert_went_on(&second.stop().await, 2);
    pair.wait_until_the_hop_is_gone(2).await;
    pair.wait_until_the_hop_is_gone(1).await;
    // Those that began at the first one need nothing of livemig's any more.
    let marks = pair
        .host(1)
        .sh("conntrack -L 2>/dev/null | grep -v 'mark=0 ' || true")
        .await;
    assert_eq!(marks.text(), "");
    assert_went_on(&first.stop().await, 3);
    pair.down().await;
}
