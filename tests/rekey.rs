//! Hosts that get another key: whoever trusts them goes on to, and what is under way goes on.

mod lab;

use lab::pair::{Pair, assert_went_on, report};
use lab::{Lab, Node};
use rustix::process::Signal;
use serde_json::{Value, json};

async fn rekey(host: &Node) -> Value {
    host.exec(&["livemig", "--json", "rekey"]).await.json()
}

/// What a host knows of the only other one.
async fn known(host: &Node) -> Value {
    host.exec(&["livemig", "--json", "hosts"]).await.json()[0].clone()
}

#[tokio::test]
async fn migrations_and_tunnels_outlive_keys() {
    let pair = Pair::of(Lab::builder(2)).await;
    let [h1, h2] = [pair.host(1), pair.host(2)];
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let client = pair
        .client(1)
        .spawn(&["client-echo", &h1.ip(), "7000"])
        .await;
    let old = known(h1).await["fingerprint"].clone();

    // The destination's key changes between two connections of a migration.
    let variables = [("LIVEMIG_STAND_STILL", "started:hold")];
    let migration = pair.spawn_migration_with("web", 1, 2, &[], &variables);
    migration.stands_still().await;
    let replaced = rekey(h2).await;
    assert_eq!(
        replaced["peers"],
        json!([{"name": "h1", "word": "new"}]),
        "{replaced}"
    );
    migration.go_on();
    let moved = migration.finish().await;
    assert!(moved.status.success(), "{moved}");
    pair.assert_moved("web", 1, 2, &report(&moved)).await;
    let now = known(h1).await;
    assert_eq!(now["fingerprint"], replaced["fingerprint"], "{now}");
    assert_ne!(now["fingerprint"], old, "{now}");

    // Both ends know the tunnel again: the connection comes home, and no other tunnel is made.
    let replaced = rekey(h1).await;
    assert_eq!(known(h2).await["fingerprint"], replaced["fingerprint"]);
    let back = pair.migrate("web", 2, 1).await;
    pair.assert_moved("web", 2, 1, &back).await;
    let marks = h1
        .sh("conntrack -L 2>/dev/null | grep -v 'mark=0 ' || true")
        .await;
    assert_eq!(marks.text(), "");
    for host in [h1, h2] {
        let links = host.sh("ip -o link | grep -c 'livemig[2-9]' || true").await;
        assert_eq!(links.text(), "0");
    }
    assert_went_on(&client.stop().await, 1);
    pair.wait_until_the_hop_is_gone(1).await;
    pair.down().await;
}

#[tokio::test]
async fn a_host_that_cannot_be_told_is_named_and_a_killed_replacement_goes_on() {
    let pair = Pair::of(Lab::builder(3)).await;
    let [h1, h2] = [pair.host(1), pair.host(2)];
    let key = h1.sh("cat /var/lib/livemig/identity/key.pem").await;

    // Killed while it talks to others.
    pair.agent(3).signal(Signal::STOP);
    let attempt = h1.spawn_command(&["livemig", "rekey"]);
    while h2
        .sh("grep -l next /var/lib/livemig/peers/h1.json || true")
        .await
        .text()
        .is_empty()
    {
        tokio::time::sleep(lab::LOOK).await;
    }
    attempt.kill().await;

    let refused = h1.try_exec(&["livemig", "rekey"]).await;
    assert_eq!(refused.status.code(), Some(3), "{refused}");
    for part in [
        "the key of this host is SHA256:",
        " still\n",
        "h2 has been told, and accepts both keys",
        "h3 could not be told: ",
        "--without h3",
        "to go on from here: livemig rekey",
    ] {
        assert!(refused.stdout.contains(part), "no {part:?} in {refused}");
    }
    let unchanged = h1.sh("cat /var/lib/livemig/identity/key.pem").await;
    assert_eq!(unchanged.text(), key.text());

    pair.agent(3).signal(Signal::CONT);
    let done = h1.exec(&["livemig", "rekey"]).await;
    for part in ["the key of this host is SHA256:", " now\n"] {
        assert!(done.stdout.contains(part), "no {part:?} in {done}");
    }
    let files = h1.sh("ls -A /var/lib/livemig/identity").await;
    assert_eq!(files.text(), "key.pem");
    let changed = h1.sh("cat /var/lib/livemig/identity/key.pem").await;
    assert_ne!(changed.text(), key.text());
    h1.run_workload("web", &[], &["echo", "7000"]).await;
    for other in ["h2", "h3"] {
        let check = ["livemig", "check", "web", "--to", other];
        h1.exec(&check).await;
    }
    pair.down().await;
}
