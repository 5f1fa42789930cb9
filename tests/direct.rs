//! The direct engine: livemig between Podman and its runtime.

mod lab;

use lab::Lab;
use lab::pair::{Pair, assert_went_on};

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
