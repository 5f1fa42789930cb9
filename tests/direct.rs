//! The direct engine: livemig between Podman and its runtime.

mod lab;

use lab::Lab;
use lab::pair::{self, Pair, assert_went_on};

/// A busy connection, and one that is silent from before the move until after it.
async fn busy_and_idle(runtime: &str) {
    let pair = Pair::direct(Lab::builder(2).runtime(runtime)).await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let client = c1
        .spawn(&["client-echo", &h1.ip(), "7000", "--idle", "1"])
        .await;
    let report = pair.migrate("web", 1, 2).await;
    println!("{report:#}");
    pair.assert_moved("web", 1, 2, &report).await;
    assert_eq!(report["engine"], "direct", "{report}");
    assert_went_on(&client.stop().await, 2);
    pair.down().await;
}

#[tokio::test]
async fn a_busy_and_an_idle_one_go_on_under_runc() {
    busy_and_idle("runc").await;
}

#[tokio::test]
async fn a_busy_and_an_idle_one_go_on_under_crun() {
    busy_and_idle("crun").await;
}

/// 64 MiB of which some is written to all the time: every page arrives, and none that is out of date.
async fn memory_arrives(runtime: &str, more: &[&str]) {
    let pair = Pair::direct(Lab::builder(2).runtime(runtime)).await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000"], &["touch", "64", "10", "7000"])
        .await;
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;
    let output = pair.try_migrate("web", 1, 2, more).await;
    assert!(output.status.success(), "{output}");
    let report = pair::report(&output);
    pair.assert_moved("web", 1, 2, &report).await;
    assert_eq!(report["engine"], "direct", "{report}");
    println!("{:#}", report["breakdown"]);
    let memory = c1.ask(h2.address(), 7000, "memory").await;
    assert_eq!(memory["pages"], 64 * 256, "{memory}");
    assert_eq!(memory["wrong"], 0, "{memory}");
    assert_eq!(memory["stale"], 0, "{memory}");
    assert_went_on(&client.stop().await, 1);
    assert!(report["bytes_sent"].as_u64() > Some(64 << 20), "{report}");
    for host in [h1, h2] {
        let left = host
            .sh("find /dev/shm/livemig-* /run/livemig/runtime/* 2>/dev/null || true")
            .await;
        assert_eq!(left.text(), "", "{left}");
    }
    pair.down().await;
}

#[tokio::test]
async fn memory_arrives_under_runc() {
    memory_arrives("runc", &[]).await;
}

#[tokio::test]
async fn memory_arrives_under_crun() {
    memory_arrives("crun", &[]).await;
}

#[tokio::test]
async fn memory_arrives_after_the_move_under_runc() {
    memory_arrives("runc", &["--post-copy"]).await;
}

#[tokio::test]
async fn memory_arrives_after_the_move_under_crun() {
    memory_arrives("crun", &["--post-copy"]).await;
}
