//! Every way in which a migration can go, checked: what ARCHITECTURE.md calls *one copy*.
//!
//! The machine ([`state`]) is both hosts and the network, step for step what the code does. It is small
//! enough to look at all of its states. Each rule that keeps the copies apart is taken away once here, and
//! the checker has to notice. The holes that are known are here too, each with the shortest way into it.
//!
//! `cargo test --test model -- --nocapture` prints the numbers and the ways.

mod destination;
mod explore;
mod network;
mod source;
mod state;

use std::collections::BTreeSet;

use explore::{Explored, explore};
use state::{Rules, Violation};

/// Explores, and shows what was found.
fn explored(what: &str, rules: &Rules) -> Explored {
    let explored = explore(rules);
    println!("{what}: {explored}");
    explored
}

/// The checker finds this, by a way that goes through this step.
#[track_caller]
fn assert_found(explored: &Explored, violation: Violation, by: &str) {
    let trace = explored.trace(violation);
    let trace = trace.unwrap_or_else(|| panic!("{violation:?} was not found: {explored}"));
    assert!(trace.has(by), "not by `{by}`:\n{trace}");
}

#[test]
fn one_copy_whatever_happens() {
    let explored = explored("as it is", &Rules::KEPT);
    assert_eq!(explored.kinds(), [], "{explored}");
    assert!(explored.states > 1_000, "{explored}");
    let ends = explored.ends.iter();
    let ends: BTreeSet<_> = ends
        .map(|end| format!("{:?}, {:?}", end.original, end.copy))
        .collect();
    let documented = [
        "Ended, Absent",  // The source's host crashed with the original.
        "Removed, Ended", // The destination's host crashed with the copy.
        "Removed, Runs",
        "Runs, Absent",
    ];
    assert_eq!(ends, BTreeSet::from(documented.map(str::to_owned)));
}

#[test]
fn a_thaw_on_a_guess_is_found() {
    let rules = Rules {
        thaw_only_when_undone: false,
        ..Rules::KEPT
    };
    let explored = explored("thaw on a guess", &rules);
    assert_found(&explored, Violation::TwoCopies, "thaw on a guess");
}

#[test]
fn a_thaw_before_the_destination_has_undone_is_found() {
    let rules = Rules {
        undone_before_thaw: false,
        ..Rules::KEPT
    };
    let explored = explored("thaw first", &rules);
    assert_found(&explored, Violation::TwoCopies, "thaw before anything else");
}

#[test]
fn telling_before_writing_is_found() {
    let rules = Rules {
        commit_journaled_first: false,
        ..Rules::KEPT
    };
    let explored = explored("told before written", &rules);
    assert_found(&explored, Violation::TwoCopies, "journal later");
}

#[test]
fn a_recovery_that_does_not_ask_is_found() {
    let rules = Rules {
        recover_asks: false,
        ..Rules::KEPT
    };
    let explored = explored("recover without asking", &rules);
    assert_found(&explored, Violation::TakenBack, "recover: undo");
}

#[test]
fn an_agent_that_undoes_what_runs_is_found() {
    let rules = Rules {
        resume_keeps_what_runs: false,
        ..Rules::KEPT
    };
    let explored = explored("resume undoes what runs", &rules);
    assert_found(&explored, Violation::NoCopy, "agent: starts");
    assert_found(&explored, Violation::TakenBack, "agent: starts");
}

/// Also what is left if Podman needs longer than `restores_ended` waits.
#[test]
fn undoing_what_podman_is_still_at_is_found() {
    let rules = Rules {
        wait_for_podman: false,
        ..Rules::KEPT
    };
    let explored = explored("not waiting for podman", &rules);
    assert_found(&explored, Violation::TwoCopies, "podman: the copy runs");
}

/// The agent was killed between Podman's answer and opening the gate, and the source's process with it:
/// `recover` heard that the container runs, finished, and nothing ever opened the gate.
#[test]
fn a_gate_that_stays_closed_is_found() {
    let rules = Rules {
        commit_opens_gate: false,
        ..Rules::KEPT
    };
    let explored = explored("a gate that stays closed", &rules);
    assert_found(&explored, Violation::Unclean, "agent: is killed");
}

/// Requests have no numbers of their own: that none comes twice is left to TLS.
#[test]
fn what_is_left_to_tls() {
    let rules = Rules {
        replays: true,
        ..Rules::KEPT
    };
    let explored = explored("replayed requests", &rules);
    assert_found(&explored, Violation::TwoCopies, "late request to restore");
}

/// Known: the source's process has ended while its request to undo was in a kernel's buffer or in front
/// of the session's lock. From then on packets pass, and peers may hear the copy before it is removed. If
/// `recover` has been told in between that the copy runs, it gives up the original, and none is left.
#[test]
fn known_a_late_request_to_undo_takes_the_last_copy() {
    let rules = Rules {
        dead_are_heard: true,
        ..Rules::KEPT
    };
    let explored = explored("the dead are heard", &rules);
    assert_eq!(
        explored.kinds(),
        [Violation::NoCopy, Violation::TakenBack],
        "never two copies, and always an end: {explored}"
    );
    assert_found(&explored, Violation::NoCopy, "late request to undo");
    assert_found(&explored, Violation::TakenBack, "late request to undo");
}

/// Known: three faults. Podman has restored the container, the agent cannot open its gate and cannot
/// remove it either, and the source's host crashes: the next request removes the only copy.
#[test]
fn known_a_failed_restore_may_have_been_the_last_copy() {
    let rules = Rules {
        failures_linger: true,
        ..Rules::KEPT
    };
    let explored = explored("a failed restore lingers", &rules);
    assert_eq!(explored.kinds(), [Violation::TakenBack], "{explored}");
    let trace = explored.trace(Violation::TakenBack);
    assert!(trace.is_some_and(|trace| trace.has("source: the host crashes")));
}

/// Known: a host that starts its containers when it comes up does not ask livemig whether they have left.
#[test]
fn known_a_host_that_starts_its_containers_again_makes_a_second_copy() {
    let rules = Rules {
        restarts_containers: true,
        ..Rules::KEPT
    };
    let explored = explored("the source's host starts it again", &rules);
    assert_found(&explored, Violation::TwoCopies, "source: the host crashes");
}
