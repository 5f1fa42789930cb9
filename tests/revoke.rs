//! A host that is trusted no more: refused at once, its preparations undone, its tunnel down when
//! nobody needs it.

mod lab;

use lab::pair::{Pair, assert_went_on};
use lab::{LOOK, Node};
use serde_json::Value;

/// Far longer than an agent takes to notice.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

async fn revoke(host: &Node, arguments: &[&str]) -> Value {
    let command = [&["livemig", "--json", "revoke"], arguments].concat();
    host.exec(&command).await.json()
}

async fn hops(host: &Node) -> String {
    let hops = host.sh("ls /run/livemig/hops/*.json 2>/dev/null || true");
    hops.await.text().to_owned()
}

#[tokio::test]
async fn it_is_refused_and_connections_go_on_until_they_are_cut_off() {
    let pair = Pair::up().await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    let output = h1.try_exec(&["livemig", "revoke", "nobody"]).await;
    assert_eq!(output.status.code(), Some(3), "{output}");
    assert!(output.stderr.contains("livemig hosts"), "{output}");

    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let client = pair
        .client(1)
        .spawn(&["client-echo", &h1.ip(), "7000"])
        .await;
    let report = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &report).await;

    let output = h1.exec(&["livemig", "revoke", "h2"]).await;
    let said = &output.stdout;
    assert!(
        said.starts_with("h2 is not known here any more: whatever it asks is refused\n"),
        "{output}"
    );
    assert!(
        said.contains("the tunnel to h2 stays until what uses it has ended:\n  tcp"),
        "{output}"
    );
    let (_, next) = said.split_once("livemig revoke ").expect("what to do next");
    let fingerprint = next.split_whitespace().next().expect("a fingerprint");
    assert!(fingerprint.starts_with("SHA256:"), "{output}");

    // Both ways: it is not known here, and nothing is known of this host there.
    let known = h1.exec(&["livemig", "--json", "hosts"]).await.json();
    assert_eq!(known, serde_json::json!([]));
    let refused = h2
        .try_exec(&["livemig", "--json", "check", "web", "--to", "h1"])
        .await;
    assert_eq!(refused.status.code(), Some(4), "{refused}");
    let again = h1.try_exec(&["livemig", "revoke", "h2"]).await;
    assert_eq!(again.status.code(), Some(3), "{again}");

    // What was promised: the connection goes on.
    let output = h1.exec(&["livemig", "--json", "flows"]).await.json();
    assert_eq!(output.as_array().map(Vec::len), Some(1), "{output}");
    assert_went_on(&client.stop().await, 1);

    // Its connection may be remembered as one that ended; whatever is left is cut off now.
    if !hops(h1).await.is_empty() {
        let output = revoke(h1, &[fingerprint, "--now"]).await;
        assert_eq!(output["hop"], "down", "{output}");
        assert_eq!(output["name"], Value::Null, "{output}");
        assert_eq!(output["leftovers"], serde_json::json!([]), "{output}");
    }
    pair.wait_until_the_hop_is_gone(1).await;
    pair.down().await;
}

#[tokio::test]
async fn what_it_only_prepared_is_undone() {
    let pair = Pair::up().await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    // The source dies when it has prepared the destination.
    let attempt = pair.spawn_migration("web", 1, 2, &[]);
    attempt.wait_for(r#""finished","phase":"prepare""#).await;
    attempt.kill().await;
    assert_ne!(hops(h2).await, "", "it had prepared something");

    let token = h2.exec(&["livemig", "invite", "--address", &h2.ip()]).await;
    let output = revoke(h2, &["h1"]).await;
    assert_eq!(output["name"], "h1", "{output}");
    assert_eq!(output["invitations"], 1, "{output}");
    let join = ["livemig", "join", token.text(), "--name", "h2"];
    let refused = h1.try_exec(&join).await;
    assert!(!refused.status.success(), "{refused}");
    assert_eq!(output["leftovers"], serde_json::json!([]), "{output}");
    let began = std::time::Instant::now();
    let left = async || {
        let journals = h2.sh("ls /var/lib/livemig/journal/incoming 2>/dev/null || true");
        hops(h2).await + journals.await.text()
    };
    while !left().await.is_empty() {
        assert!(began.elapsed() < PATIENCE, "still there: {}", left().await);
        tokio::time::sleep(LOOK).await;
    }
    assert_eq!(h2.container_state("web").await, None);
    assert_eq!(h1.container_state("web").await.as_deref(), Some("running"));
    pair.down().await;
}
