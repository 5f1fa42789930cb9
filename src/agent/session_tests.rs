use std::process::Command;

use super::end::let_in;
use super::*;
use crate::conntrack::Gate;
use crate::migration::Effect;
use crate::podman::ContainerId;

/// Runs in a network namespace of its own.
fn alone<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        // SAFETY: a thread that is in another network namespace shares nothing else less than before.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
            .expect("network namespaces need root");
        // One thread, so that `nft` is started from it.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(work)
    });
    thread.join().unwrap()
}

/// The rules of the caller's namespace.
fn rules() -> String {
    let listed = Command::new("nft").args(["list", "ruleset"]).output();
    String::from_utf8(listed.unwrap().stdout).unwrap()
}

/// The agent that closed the gate has died between Podman's "restored" and opening it: whoever takes its
/// journal over as that of a container that stays has to.
#[test]
fn a_gate_that_a_dead_agent_left_closed_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), &MigrationId::random().unwrap()).unwrap();
    let container: ContainerId = "5".repeat(64).parse().unwrap();
    let gate = Gate {
        container,
        addresses: vec!["10.88.0.5".parse().unwrap()],
    };
    journal
        .will([Effect::Closed { gate: gate.clone() }])
        .unwrap();
    let (closed, open) = alone(async move {
        gate.close().await.unwrap();
        let closed = rules();
        let_in(&journal).await.unwrap();
        // It may be told twice.
        let_in(&journal).await.unwrap();
        (closed, rules())
    });
    assert!(closed.contains("10.88.0.5"), "{closed}");
    assert!(!open.contains("10.88.0.5"), "{open}");
}

#[test]
fn no_more_migrations_come_at_one_time_than_may() {
    let sessions = |incoming| {
        Sessions::new(Config {
            incoming,
            ..Config::default()
        })
    };
    sessions(1).room_for_one_more().unwrap();
    let full = sessions(0).room_for_one_more().unwrap_err();
    assert_eq!(full.code(), "too-many-incoming");
    assert_eq!(full.class(), Class::Refused);
    assert!(full.to_string().contains("limit: incoming"), "{full}");
}
