//! One move, with hosts of its own, a container of its own and one fresh connection to it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::engine::{CONTAINER, Engine, Hosts, Known};
use crate::lab::Node;
use crate::memory::Watch;
use crate::workload::{PORT, Workload};

/// Before and after: the connection is to be seen at work, and going on.
const SETTLE: Duration = Duration::from_millis(500);
/// A client whose packets were dropped asks again after up to twice the time they were dropped for.
const GRACE_MS: &str = "90000";

/// Moves a container, and returns all that was measured. `survived` says whether the connection went
/// on with nothing wrong and, of the memory, every page is there as it was last written.
pub async fn measure(known: Known, workload: Workload, engine: Engine) -> Value {
    let hosts = Hosts::up(known, engine).await;
    let (source, destination) = (hosts.lab.host(1), hosts.lab.host(2));
    let client = hosts.lab.client(1);
    let command = workload.command();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let publish = format!("{PORT}:{PORT}");
    source
        .run_workload(CONTAINER, &["-p", &publish], &command)
        .await;
    let address = source.ip();
    if workload != Workload::ECHO {
        until_it_listens(client, &address).await;
    }
    let mut arguments = vec!["client-echo", &address, PORT, "--every-ms", "1"];
    arguments.extend(["--grace-ms", GRACE_MS]);
    let connected = client.spawn(&arguments).await;
    tokio::time::sleep(SETTLE).await;

    let watch = Watch::begin([source, destination]).await;
    let moved = hosts.migrate(engine).await;
    let peaks = watch.end();
    tokio::time::sleep(SETTLE).await;
    // Requests that wait are answered before the client ends.
    let seen = connected.stop().await;

    let end = hosts.lab.host(engine.ends_at());
    let intact = workload == Workload::ECHO || {
        let memory = match engine {
            // Podman does not know the process that runs now.
            Engine::Floor => memory_from_outside(client, end).await,
            // The naive migration leaves a host that no newcomer gets an answer from.
            _ => memory_from_inside(end).await,
        };
        is_intact(&memory, workload)
    };
    let in_place = engine == Engine::Floor
        || (end.container_state(CONTAINER).await.as_deref() == Some("running")
            && source.container_state(CONTAINER).await.is_none());
    let survived = in_place
        && intact
        && seen["same_socket"] == true
        && seen["resets"] == 0
        && seen["unanswered"] == 0
        && seen["wrong"] == 0
        && seen["replies"].as_u64() > Some(0);
    let mut run = moved.figures;
    run["gap_ms"] = seen["longest_gap_ms"].clone();
    run["total_ms"] = json!(moved.total.as_secs_f64() * 1e3);
    run["peak_extra_mib"] = json!({ "source": peaks[0], "destination": peaks[1] });
    if engine == Engine::Floor {
        // There is none.
        run["peak_extra_mib"]["destination"] = Value::Null;
    }
    run["intact"] = json!(intact);
    run["survived"] = json!(survived);
    run["client"] = seen;
    hosts.down().await;
    run
}

/// Waits for the container's program, which listens once it has all of its memory. A client gives up
/// before it has the largest.
async fn until_it_listens(client: &Node, address: &str) {
    const TRIES: usize = 12;
    for _ in 1..TRIES {
        let ask = client.try_exec(&["workload", "ask", address, PORT, "info"]);
        if ask.await.status.success() {
            return;
        }
    }
    client
        .exec(&["workload", "ask", address, PORT, "info"])
        .await;
}

/// What the container's program says of its memory after having looked at every page.
async fn memory_from_inside(host: &Node) -> Value {
    let ask = ["/workload", "ask", "127.0.0.1", PORT, "memory"];
    let mut command = vec!["podman", "exec", CONTAINER];
    command.extend(ask);
    host.exec(&command).await.json()
}

async fn memory_from_outside(client: &Node, host: &Node) -> Value {
    let port = PORT.parse().expect("a port by construction");
    client.ask(host.address(), port, "memory").await
}

/// Whether all of it is there, none of it wrong or from before, and written to if it is to be.
fn is_intact(memory: &Value, workload: Workload) -> bool {
    let intact = memory["pages"] == workload.pages()
        && memory["wrong"] == 0
        && memory["stale"] == 0
        && (workload.percent == 0 || memory["writes"].as_u64() > Some(0));
    if !intact {
        eprintln!("the memory is not what it was: {memory}");
    }
    intact
}
