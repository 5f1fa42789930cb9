//! Copying while the container runs.
//!
//! The rest engine makes no rounds: Podman's API writes one pre-dump at most, and cannot restore from it.
//! The phase stands in the list so that a report has the same phases whatever the engine.
//!
//! With the direct engine the content of volumes goes ahead ([`bundle::changes`]): all of it, then what has
//! changed in that time, for as long as that gets less. Then memory likewise, where the kernel can tell what was
//! written to since, if the downtime would be longer than it may be. All of this takes what it takes. Then
//! Podman at the destination makes the container, and waits for its processes, for four minutes and no longer:
//! in this time the files come that only a made container has a place for, what has changed in volumes, and once
//! more what has changed in memory. What is left goes in the downtime. Last, the runtimes are started on both
//! hosts, up to CRIU.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};

use super::memory::{self, Round};
use super::request::MOST_ROUNDS;
use super::{Cargo, Effect, Event, Migration, WhenOver, freeze, shell};
use crate::bundle::{self, Mirror, Pace, Source};
use crate::criu::{Criu, Freezer, processes};
use crate::podman::{Container, Mount};
use crate::runtime::names_cgroup_in_rounds;
use crate::{Error, Result};

/// Less memory than this, in bytes, crosses faster in the downtime than CRIU can be asked twice: 32 MiB.
const WORTH_A_ROUND: u64 = 32 << 20;
/// What of the downtime is not memory, roughly: where it was measured, 40 to 80 ms.
const OTHER_PARTS: Duration = Duration::from_millis(60);
/// So few bytes are sent in the last round as quickly as in another one before.
const FEW: u64 = 1 << 20;

pub(super) async fn precopy(migration: &mut Migration<'_>) -> Result<()> {
    if migration.shell.is_none() {
        return Ok(());
    }
    let most = match migration.request.post_copy {
        // What the destination lacks then it fetches.
        true => migration.request.most_rounds.min(1),
        false => migration.request.most_rounds,
    };
    // Podman at the destination waits for what it begins, and not for ever: whatever can take long comes before.
    let volumes = volumes(&migration.preflight.container);
    let mut mirror = Mirror::new(volumes);
    if migration.preflight.container.volumes().next().is_some() {
        mirror = file_rounds(migration, mirror, "volumes").await?;
    }
    // One of several is left for the end.
    memory_rounds(migration, if most > 1 { most - 1 } else { most }).await?;
    shell::send(migration).await?;
    let others = own_trees(&migration.preflight.container)?;
    let mirror = mirror.volumes_mounted().and(others);
    let patience = migration.request.config.podman_patience;
    let rest = async {
        migration.mirror = Some(file_rounds(migration, mirror, "files").await?);
        // What the downtime carries of the memory is what was written to since the last round: all of the time
        // that the container and its files took.
        if most > 1 && !migration.rounds.is_empty() {
            memory_rounds(migration, 1).await?;
        }
        give_up_if_over(migration)?;
        shell::stand_by(migration).await
    };
    match tokio::time::timeout(patience, rest).await {
        Ok(done) => done,
        Err(_) => Err(Error::OutOfPatience {
            peer: migration.request.to.clone(),
            after: patience,
        }),
    }
}

/// Copies files for as long as each round has less than half of the one before.
async fn file_rounds(
    migration: &mut Migration<'_>,
    mut mirror: Mirror,
    part: &str,
) -> Result<Mirror> {
    let mut before = u64::MAX;
    for _ in 0..MOST_ROUNDS {
        migration.may_go_on(migration.clock.phase())?;
        let (changes, round) = mirror.stream(Pace::Running);
        let sent = send(migration, part, changes.boxed()).await;
        // If the round has failed, that is why the stream ended early.
        mirror = round.await?.mirror;
        let sent = sent?;
        // The end of an archive, and nothing in it, is less as well.
        if sent <= FEW || sent > before / 2 {
            break;
        }
        before = sent;
    }
    Ok(mirror)
}

/// Copies memory for as long as the next round is likely to leave less to the downtime.
async fn memory_rounds(migration: &mut Migration<'_>, most: usize) -> Result<()> {
    let memory = migration.preflight.offer.memory;
    let tracks = |criu: &Criu| criu.dirty_tracking;
    let criu = &migration.preflight.offer.features.criu;
    if !criu.as_ref().is_some_and(tracks) || memory < WORTH_A_ROUND {
        return Ok(());
    }
    if most > 0 && migration.rounds.is_empty() {
        prepare_to_freeze(migration)?;
    }
    for _ in 0..most {
        migration.may_go_on(migration.clock.phase())?;
        let terms = memory::Terms::of(
            &migration.preflight,
            migration.request,
            &migration.id,
            migration.rounds.len(),
        )?;
        let shell = migration.shell.as_mut().ok_or(Error::OutOfOrder("shell"))?;
        let round = memory::round(shell, &terms, migration.clock.observer).await?;
        tracing::debug!(?round, "memory was copied");
        migration.bytes_sent += round.bytes;
        migration.clock.observer.observe(Event::Sent {
            what: Cargo::Memory,
            bytes: round.bytes,
            total: Some(round.bytes),
        });
        migration.clock.observer.observe(Event::Copied { round });
        // Podman's patience is not what the container should fail for.
        let waited = shell.made.map_or(Duration::ZERO, |made| made.elapsed());
        let in_time = waited + round.took < migration.request.config.podman_patience / 2;
        let before = migration.rounds.last().map_or(memory, |last| last.bytes);
        let first = migration.rounds.is_empty();
        migration.rounds.push(round);
        // What the next round, or the downtime, has to carry if it goes on like this: what was written to
        // in the time that this one took. If that is in the budget, or does not get less, it is time.
        if !in_time || !first && (within_budget(migration, round) || round.bytes > before / 10 * 7)
        {
            break;
        }
    }
    Ok(())
}

/// Finds out what a round freezes, and writes down how that is undone.
fn prepare_to_freeze(migration: &mut Migration<'_>) -> Result<()> {
    let shell = migration.shell()?;
    if !names_cgroup_in_rounds(&shell.runtime) {
        return Ok(());
    }
    let container = &migration.preflight.container;
    let pid = container.pid.ok_or(Error::OutOfOrder("process"))?;
    let freezer = Freezer::of(pid, Path::new("/"))?;
    let effect = Effect::Rounds {
        container: container.id.clone(),
        freezer: freezer.clone(),
    };
    migration.journal.will([effect])?;
    migration.shell()?.freezer = Some(freezer);
    Ok(())
}

/// Ends the migration, where that was asked for, if the downtime would be longer than it may be.
fn give_up_if_over(migration: &Migration<'_>) -> Result<()> {
    let over = migration.request.when_over == WhenOver::GiveUp;
    match migration.rounds.last() {
        Some(last) if over && migration.rounds.len() > 1 && !within_budget(migration, *last) => {
            Err(Error::OverBudget {
                expected: expected(*last),
                budget: migration.request.max_downtime,
            })
        }
        _ => Ok(()),
    }
}

/// How long the memory would take in the downtime that was written to during a round, if as much is written
/// to during the next: as long as that round took.
fn expected(round: Round) -> Duration {
    round.took
}

fn within_budget(migration: &Migration<'_>, last: Round) -> bool {
    expected(last) + OTHER_PARTS <= migration.request.max_downtime
}

/// How much memory a container's processes have, in bytes, shared parts counted by each.
pub(super) fn resident(container: &Container) -> u64 {
    let pids = container
        .pid
        .and_then(|pid| Freezer::of(pid, Path::new("/")).ok())
        .and_then(|freezer| processes::in_cgroup(freezer.path()).ok());
    pids.unwrap_or_default()
        .into_iter()
        .filter_map(|pid| {
            // proc_pid_statm(5): size and resident set, in pages.
            let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
            text.split(' ').nth(1)?.parse::<u64>().ok()
        })
        .sum::<u64>()
        * rustix::param::page_size() as u64
}

/// Sends one round, and says how many bytes that were.
async fn send<S>(migration: &mut Migration<'_>, part: &str, changes: S) -> Result<u64>
where
    S: Stream<Item = bundle::Result<Bytes>> + Send + 'static,
{
    let progress = migration.send_part(part, changes).await?;
    migration.clock.observer.observe(Event::Sent {
        what: Cargo::Files,
        bytes: progress.wire(),
        total: Some(progress.wire()),
    });
    Ok(progress.content())
}

/// Its volumes.
fn volumes(container: &Container) -> Vec<Source> {
    let volumes = container.mounts.iter().filter_map(|mount| match mount {
        Mount::Volume { name, source, .. } => Some(Source::volume(name, source.clone())),
        _ => None,
    });
    volumes.collect()
}

/// The other trees in which a container has files of its own.
fn own_trees(container: &Container) -> Result<Vec<Source>> {
    let mut sources = vec![Source::rootfs(freeze::layers(container)?)];
    // Not there with `--ipc none`.
    let shm = container.static_dir.join("shm");
    if shm.is_dir() {
        sources.push(Source::shm(shm));
    }
    Ok(sources)
}
