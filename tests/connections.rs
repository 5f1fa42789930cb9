//! Connections go on from another host: the point of it all.

mod lab;

use lab::Lab;
use lab::pair::Pair;
use serde_json::Value;

/// Panics unless an echo client's connections all went on, with nothing wrong.
#[track_caller]
fn assert_went_on(report: &Value, connections: u64) {
    assert_eq!(report["connected"], connections, "{report}");
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["resets"], 0, "{report}");
    assert_eq!(report["unanswered"], 0, "{report}");
    assert_eq!(report["same_socket"], true, "{report}");
}

/// A busy connection and one that is silent from before the move until after it, under a runtime.
async fn busy_and_idle(runtime: &str) {
    let pair = Pair::of(Lab::builder(2).runtime(runtime)).await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    let publish = ["-p", "7000:7000"];
    let before = pair.settled(1, &publish).await;
    h1.run_workload("web", &publish, &["echo", "7000"]).await;
    let client = c1
        .spawn(&["client-echo", &h1.ip(), "7000", "--idle", "1"])
        .await;

    let report = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &report).await;
    assert_eq!(
        report["flows"].as_array().map(Vec::len),
        Some(2),
        "{report}"
    );
    println!(
        "{}",
        before.difference(&h1.census().await).unwrap_or_default()
    );

    // Only now does the idle one speak again.
    let client = client.stop().await;
    assert_went_on(&client, 2);
    println!("{client}");
    h1.assert_as_before(&before).await;
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
