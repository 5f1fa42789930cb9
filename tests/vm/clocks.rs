//! Clocks that jump while a container stands frozen between two machines, on both of them and in opposite
//! directions. Nothing that a migration waits for or measures goes by the time of day.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::lab::{IMAGE, Lab, Node};
use super::standstill::Move;
use super::{Clock, report_in};

/// There, with a source whose clock is set forward, and back, with one whose clock is set back: the tunnel's
/// session is older than the first jump, and its age no measure any more.
pub async fn jump(clock: &Clock, lab: &Lab) {
    println!("\n== clocks that jump");
    let (a, b) = (lab.host(1), lab.host(2));
    clock.step("a", "podman run --name clocks -p 7009:7009");
    let run = ["podman", "run", "-d", "--name", "clocks", "-p", "7009:7009"];
    a.exec(&[&run[..], &[IMAGE, "echo", "7009"]].concat()).await;
    let ask = [
        "client-echo",
        &a.ip(),
        "7009",
        "--every-ms",
        "10",
        "--grace-ms",
        "60000",
    ];
    let client = lab.client(1).spawn(&ask).await;
    for (from, to, its_name, of_source, of_destination) in [
        (a, b, "host-b", "+5 hours", "-3 hours"),
        (b, a, "host-a", "-3 hours", "+5 hours"),
    ] {
        let it = Move {
            container: "clocks",
            from,
            to: its_name,
            engine: "direct",
        };
        let migration = it.until(clock, "started:transfer").await;
        set(clock, from, of_source).await;
        set(clock, to, of_destination).await;
        it.go_on().await;
        let migrated = migration.finish().await;
        assert!(migrated.status.success(), "{migrated}");
        makes_sense(clock, &report_in(&migrated.stdout));
        for host in [from, to] {
            let left = host.exec(&["livemig", "recover", "--json"]).await;
            assert_eq!(left.json(), Value::Array(Vec::new()), "{left}");
        }
        assert_eq!(
            to.container_state("clocks").await.as_deref(),
            Some("running")
        );
        assert_eq!(from.container_state("clocks").await, None);
    }
    let seen = client.stop().await;
    clock.step("c1", "what the client saw");
    clock.show(&format!(
        "{} requests, {} replies, {} resets; longest gap {} ms",
        seen["requests"], seen["replies"], seen["resets"], seen["longest_gap_ms"]
    ));
    for nothing in ["wrong", "resets", "unanswered"] {
        assert_eq!(seen[nothing], 0, "{seen:#}");
    }
    assert_eq!(seen["same_socket"], true, "{seen:#}");
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.expect("it is later than 1970").as_secs();
    for host in [a, b] {
        host.exec(&["date", "-s", &format!("@{now}")]).await;
    }
    a.exec(&["podman", "rm", "--force", "--time", "0", "clocks"])
        .await;
}

async fn set(clock: &Clock, host: &Node, to: &str) {
    clock.step(host.name(), &format!("date -s '{to}'"));
    let now = host.exec(&["date", "-s", to]).await;
    clock.show(now.text());
}

/// No time in a report is longer than all of it has taken.
fn makes_sense(clock: &Clock, report: &Value) {
    const LONGEST: Duration = Duration::from_secs(120);
    clock.show(&format!(
        "{} ms without service, {} ms in all",
        report["downtime_ms"], report["total_ms"]
    ));
    let ms = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no time: {value}"));
    let total = ms(&report["total_ms"]);
    assert!(total < LONGEST.as_secs_f64() * 1e3, "{report:#}");
    assert!(ms(&report["downtime_ms"]) > 0.0, "{report:#}");
    let parts = [&report["breakdown"], &report["phases"], &report["rounds"]];
    let parts = parts.iter().filter_map(|list| list.as_array()).flatten();
    for time in parts
        .map(|part| &part["ms"])
        .chain([&report["downtime_ms"]])
    {
        assert!((0.0..=total).contains(&ms(time)), "{time}: {report:#}");
    }
}
