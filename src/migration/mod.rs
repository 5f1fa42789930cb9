//! The migration, as the list of its phases.
//!
//! [`migrate`] runs them in order. Each is a file of its own here, and each writes into the journal
//! what it is about to change before it does. When one fails, the journal is walked backwards, and the
//! container goes on at the source as if nothing had been. From [`Phase::Steer`] on there is no way
//! back: the destination runs the container and its peers hear it, and what is left to do here is
//! retried, then reported.
//!
//! After a crash the destination's word decides: if it says that the container runs there, the
//! migration is finished, else it is undone. So nothing has to be written to disk between "it runs"
//! and letting the packets go.
//!
//! The states that this goes through are drawn in [`protocol`](crate::agent::protocol).

mod agreed;
mod arrival;
mod check;
mod commit;
mod downtime;
mod drain;
mod effect;
mod engine;
mod event;
mod flows;
mod forwarding;
mod freeze;
mod hold;
mod home;
mod hop;
mod journal;
mod lock;
mod memory;
mod path;
mod plan;
mod precopy;
mod preflight;
mod prepare;
mod recover;
mod report;
mod request;
mod restore;
mod revoke;
mod shell;
mod steer;
mod transfer;
mod undo;

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub(crate) use agreed::Agreed;
#[cfg(any(test, fuzzing))]
pub(crate) use arrival::forbidden;
pub use arrival::{Policy, Privilege, UnknownPrivilege};
pub(crate) use check::{at_destination, refuse};
pub use downtime::{Part, PartTime};
pub use drain::{Drain, Left, Undrained};
pub use effect::{Asked, Effect, End};
pub use engine::Engine;
pub use event::{Cargo, Event, Observer, Phase, UnknownPhase};
pub(crate) use flows::{forget, mark_all, of as flows_of};
pub(crate) use forwarding::{
    admitted, after_arrival, at_home, change as change_forwarding, no_more_from,
    of as forwarding_of, redirected,
};
pub use forwarding::{forwardings, stop_forwarding};
pub(crate) use home::{Away, ON_ITS_WAY, came_from_here, mark_end};
pub(crate) use hop::{
    answer_verify, connect as connect_hop, open as open_hop, peer_of, tunnels, verify as verify_hop,
};
pub(crate) use journal::number_of;
pub use journal::{Journal, JournalError, left_behind};
pub use memory::Round;
pub(crate) use memory::{directories as round_directories, parent as parent_round};
pub use path::Path;
pub use plan::{Plan, plan};
pub use preflight::{Preflight, check, must_be_root};
pub(crate) use preflight::{connect, find, podman};
pub(crate) use prepare::mtu;
pub use recover::{Keep, Recovered, recover};
pub use report::{Leftover, PhaseTime, Report};
pub use request::{MAX_DOWNTIME, MOST_ROUNDS, Request, WhenFull, WhenOver};
pub use revoke::{Hopless, Revoked, revoke};
pub(crate) use shell::{make as make_private, staging};
pub(crate) use undo::{Hands, leave_idle_hops, remove_staging, unwind};

use crate::agent::protocol::MigrationId;
use crate::agent::{Connection, Peer};
use crate::bundle::Mirror;
use crate::conntrack::forward::Forwarding;
use crate::conntrack::hold::{HoldReport, Released};
use crate::conntrack::{Fence, Flow};
use crate::criu::{DumpStats, Freezer};
use crate::tunnel::HopId;
use crate::{Class, Error, Result};
use downtime::Downtime;
use lock::Lock;

/// Moves a container to another host.
///
/// # Errors
/// Before anything was changed: whatever the preflight found, as [`Error::Refused`] and others of
/// [`Class::Refused`]. Later: [`Error::RolledBack`], with the container running
/// at the source, or [`Error::InDoubt`] or [`Error::NoLongerThere`], with the container frozen at the source
/// because the destination does not say whether it runs there, or ran it and does not any more.
pub async fn migrate(request: &Request, observer: &mut dyn Observer) -> Result<Report> {
    // Once packets are let go, peers have heard the copy: taking it back would break them.
    if let Some(phase) = request.rehearse.filter(|last| *last >= Phase::Steer) {
        return Err(Error::NotRehearsable(phase));
    }
    let mut clock = Clock::start(observer);
    clock.enter(Phase::Preflight);
    let ready = preflight::ready(request, &mut clock).await?;
    clock.leave();
    let mut migration = Migration::begin(request, ready, clock)?;
    match migration.forward().await {
        Ok(()) => Ok(migration.report()),
        Err(doubt) if doubt.class() == Class::InDoubt => Err(doubt),
        Err(error) if migration.let_go => {
            migration.note("finishing", Err(error));
            Ok(migration.report())
        }
        Err(cause) => Err(migration.roll_back(cause).await),
    }
}

/// A migration under way: what one phase finds out and a later one needs.
struct Migration<'a> {
    request: &'a Request,
    id: MigrationId,
    clock: Clock<'a>,
    preflight: Preflight,
    peer: Peer,
    connection: Connection,
    journal: Journal,
    hands: Hands,
    _lock: Lock,
    hop: Option<HopId>,
    /// Whether the destination has connections of this container that it once sent away.
    comes_home: bool,
    /// Which of the flows now end at the destination, as before they had left it.
    at_home: Vec<Flow>,
    freezer: Option<Freezer>,
    fence: Option<Fence>,
    forwarding: Option<Forwarding>,
    shell: Option<shell::Shell>,
    /// Which of the container's files the destination has.
    mirror: Option<Mirror>,
    frozen: Option<freeze::Frozen>,
    flows: Vec<Flow>,
    stream: Option<transfer::Stream>,
    /// Whether the world may have heard of the copy at the destination.
    let_go: bool,
    /// The rounds in which memory was copied while the container ran.
    rounds: Vec<memory::Round>,
    downtime: Downtime,
    /// For how long the container read nothing when it ran already, and its memory was being fetched.
    unread: Option<Duration>,
    drain: Drain,
    /// The hold, once packets pass, until its rules are gone.
    released: Option<Released>,
    held: HoldReport,
    dump: Option<DumpStats>,
    paths: Vec<Path>,
    bytes_sent: u64,
    bytes_frozen: u64,
    leftovers: Vec<Leftover>,
}

impl<'a> Migration<'a> {
    fn begin(
        request: &'a Request,
        ready: preflight::Ready,
        clock: Clock<'a>,
    ) -> Result<Migration<'a>> {
        let preflight::Ready {
            preflight,
            peer,
            connection,
            podman,
            lock,
        } = ready;
        let id = MigrationId::random().map_err(Error::Random)?;
        let journal = Journal::create(&request.config.outgoing_dir(), &id)?;
        Ok(Migration {
            request,
            id,
            clock,
            preflight,
            peer,
            connection,
            journal,
            hands: Hands::new(request.config.clone(), podman),
            _lock: lock,
            hop: None,
            comes_home: false,
            at_home: Vec::new(),
            freezer: None,
            fence: None,
            forwarding: None,
            shell: None,
            mirror: None,
            frozen: None,
            flows: Vec::new(),
            stream: None,
            let_go: false,
            rounds: Vec::new(),
            downtime: Downtime::default(),
            unread: None,
            drain: Drain::default(),
            released: None,
            held: HoldReport::default(),
            dump: None,
            paths: Vec::new(),
            bytes_sent: 0,
            bytes_frozen: 0,
            leftovers: Vec::new(),
        })
    }

    /// The phases, in order.
    async fn forward(&mut self) -> Result<()> {
        for phase in Phase::ALL {
            if phase == Phase::Preflight {
                continue;
            }
            self.may_go_on(phase)?;
            self.clock.enter(phase);
            match phase {
                Phase::Preflight => {}
                Phase::Prepare => prepare::prepare(self).await?,
                Phase::Precopy => {
                    // It may take long, and what it has begun is in the journal.
                    let cancel = self.request.cancel.clone();
                    tokio::select! {
                        () = cancel.cancelled() => return Err(Error::Interrupted(phase)),
                        done = precopy::precopy(self) => done?,
                    }
                }
                Phase::Hold => hold::hold(self).await?,
                Phase::Freeze => freeze::freeze(self).await?,
                Phase::Transfer => transfer::transfer(self).await?,
                Phase::Restore => restore::restore(self).await?,
                Phase::Steer => steer::steer(self).await?,
                Phase::Commit => commit::commit(self).await?,
            }
            self.clock.leave();
        }
        Ok(())
    }

    /// The hop to the destination.
    fn hop(&self) -> Result<HopId> {
        self.hop.ok_or(Error::OutOfOrder("hop"))
    }

    /// Whether somebody wants it to end before `next` begins.
    fn may_go_on(&self, next: Phase) -> Result<()> {
        if self.let_go {
            return Ok(());
        }
        if self.request.cancel.is_cancelled() {
            return Err(Error::Interrupted(self.clock.phase()));
        }
        if self.hold_is_full().is_cancelled() {
            return Err(self.request.hold_full());
        }
        match self.request.rehearse {
            Some(last) if last < next => Err(Error::Rehearsed(last)),
            _ => Ok(()),
        }
    }

    /// Is cancelled when no more packets can wait and the migration is to be given up for that.
    fn hold_is_full(&self) -> CancellationToken {
        match (self.hands.holds.first(), self.request.when_full) {
            (Some(hold), WhenFull::GiveUp) => hold.full(),
            _ => CancellationToken::new(),
        }
    }

    /// Undoes everything, newest first, and says what came of it.
    async fn roll_back(mut self, cause: Error) -> Error {
        let phase = self.clock.phase();
        self.clock.observer.observe(Event::RollingBack {
            cause: cause.full(),
        });
        let outcome = undo::unwind(&mut self.hands, &self.journal, self.clock.observer).await;
        match outcome {
            Ok(mut leftovers) => {
                if leftovers.is_empty()
                    && let Err(error) = self.journal.close()
                {
                    leftovers.push(Leftover {
                        effect: "the journal".to_owned(),
                        failure: error.to_string(),
                    });
                }
                Error::RolledBack {
                    phase,
                    cause: Box::new(cause),
                    leftovers,
                }
            }
            Err(destination) => Error::InDoubt {
                cause: Box::new(cause),
                destination,
            },
        }
    }

    fn report(self) -> Report {
        let container = &self.preflight.container;
        Report {
            migration: self.id,
            container: container.id.clone(),
            name: container.name.clone(),
            engine: self.preflight.engine,
            destination: self.request.to.clone(),
            downtime: self.downtime.total(),
            frozen: self.downtime.frozen(),
            breakdown: self.downtime.into_parts(),
            unread: self.unread,
            total: self.clock.started.elapsed(),
            phases: self.clock.times,
            bytes_sent: self.bytes_sent,
            bytes_frozen: self.bytes_frozen,
            flows: self.flows,
            paths: self.paths,
            drain: self.drain,
            held: self.held,
            dump: self.dump,
            rounds: self.rounds,
            warnings: self.preflight.findings,
            leftovers: self.leftovers,
        }
    }
}

/// Tells the observer where the migration is, and keeps the times for the report.
struct Clock<'a> {
    observer: &'a mut dyn Observer,
    started: Instant,
    current: (Phase, Instant),
    times: Vec<PhaseTime>,
}

impl<'a> Clock<'a> {
    fn start(observer: &'a mut dyn Observer) -> Clock<'a> {
        let now = Instant::now();
        Clock {
            observer,
            started: now,
            current: (Phase::Preflight, now),
            times: Vec::new(),
        }
    }

    fn phase(&self) -> Phase {
        self.current.0
    }

    fn enter(&mut self, phase: Phase) {
        tracing::debug!(%phase, "begins");
        self.observer.observe(Event::Started { phase });
        self.current = (phase, Instant::now());
    }

    fn leave(&mut self) {
        let (phase, since) = self.current;
        let took = since.elapsed();
        tracing::debug!(%phase, ?took, "has ended");
        self.times.push(PhaseTime { name: phase, took });
        self.observer.observe(Event::Finished { phase, took });
    }
}
