//! Undoing what the journal names.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use hyper::Method;
use serde::de::DeserializeOwned;

use super::effect::{Asked, Effect, End};
use super::event::{Event, Observer};
use super::home::send_away;
use super::hop::tunnels;
use super::journal::{Journal, under_way};
use super::preflight::{connect, peer};
use super::report::Leftover;
use super::{flows, forwarding};
use crate::agent::protocol::{MigrationId, Nothing, Stage, Status, Undone};
use crate::conntrack::hold::{Hold, Pace, To};
use crate::conntrack::{self, Family, Fence, Table, alias, steer};
use crate::netlink::Namespace;
use crate::podman::{self, Client, ContainerId, PublishedPort, RemoveOptions, remains};
use crate::tunnel::HopId;
use crate::{Config, Error, Result};

/// How long to wait before asking again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What undoing needs that a journal cannot hold.
#[derive(Debug)]
pub(crate) struct Hands {
    pub config: Config,
    pub podman: Client,
    /// The holds that this process has. After a crash there are none, and only their rules are left.
    pub holds: Vec<Hold>,
    /// The network namespace of the container whose packets are held.
    pub namespace: Option<Namespace>,
    /// Whether Podman, or its runtime, may still be at work on what was asked of it: whoever asked has
    /// died, or gave up waiting, or Podman has died.
    pub unsure: bool,
    /// Whether the container is this host's though the destination does not say that it has given up
    /// its copy: the operator has said so.
    pub kept_here: bool,
}

/// Why an effect is still there.
#[derive(Debug)]
pub(crate) enum UndoError {
    /// It could not be removed; the rest can go on.
    Failed(Error),
    /// This destination does not say whether it runs the container: nothing else may be undone.
    InDoubt(String, Error),
}

impl<E: Into<Error>> From<E> for UndoError {
    fn from(error: E) -> Self {
        UndoError::Failed(error.into())
    }
}

/// Undoes a journal from its end. What cannot be undone is returned.
///
/// # Errors
/// The name of a destination that may run the container and does not answer.
pub(crate) async fn unwind(
    hands: &mut Hands,
    journal: &Journal,
    observer: &mut dyn Observer,
) -> Result<Vec<Leftover>, String> {
    let mut leftovers = Vec::new();
    if hands.unsure {
        for effect in journal.effects() {
            if let Effect::Forget { container, .. } | Effect::Rounds { container, .. } = effect {
                hands.checkpoint_ended(container).await;
            }
        }
    }
    let done = journal.effects().iter().rev();
    // Past the point of no return nothing is undone, and before it nothing is forgotten.
    for effect in done.filter(|effect| !matches!(effect, Effect::Forget { .. })) {
        if matches!(effect, Effect::Restored { .. }) && hands.unsure {
            let since = journal.written().unwrap_or(SystemTime::UNIX_EPOCH);
            hands.restores_ended(since).await;
        }
        let failure = match hands.undo(effect).await {
            Ok(()) => None,
            Err(UndoError::Failed(error)) => Some(error.to_string()),
            Err(UndoError::InDoubt(destination, error)) => {
                let failure = Some(error.to_string());
                observer.observe(Event::Undone {
                    effect: effect.to_string(),
                    failure,
                });
                return Err(destination);
            }
        };
        if let Some(failure) = &failure {
            leftovers.push(Leftover {
                effect: effect.to_string(),
                failure: failure.clone(),
            });
        }
        observer.observe(Event::Undone {
            effect: effect.to_string(),
            failure,
        });
    }
    remains::sweep();
    Ok(leftovers)
}

impl Hands {
    pub fn new(config: Config, podman: Client) -> Hands {
        Hands {
            config,
            podman,
            holds: Vec::new(),
            namespace: None,
            unsure: false,
            kept_here: false,
        }
    }

    /// Waits until the checkpoint has ended that a process that died had asked for, or that a Podman
    /// that died was at work on.
    ///
    /// CRIU leaves frozen what it found frozen (`freezer_restore_state` in `criu/seize.c`): what is
    /// thawed during a dump would be frozen again at its end, with nobody there to thaw it.
    async fn checkpoint_ended(&self, container: &ContainerId) {
        const LOOK_AGAIN: Duration = Duration::from_millis(20);
        let longest = self.config.checkpoint_timeout;
        let began = Instant::now();
        // Podman locks a container while it works on it, and whoever looks waits.
        while let Err(podman::Error::Timeout { .. }) = self.podman.inspect(container.as_str()).await
            && began.elapsed() < longest
        {}
        while remains::checkpoint_under_way(container) && began.elapsed() < longest {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until whoever sees to it that the container goes on after a round of memory has done so. It waits
    /// for the CRIU that was at work, which may freeze what is thawed before.
    async fn round_ended(&self, container: &ContainerId) {
        const LOOK_AGAIN: Duration = Duration::from_millis(5);
        let began = Instant::now();
        while remains::thaw_under_way(container) && began.elapsed() < self.config.checkpoint_timeout
        {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until Podman has ended the restores that it was asked for since then.
    ///
    /// Podman goes on when whoever asked has died: an archive that it has all of becomes a container,
    /// after a while in which nothing of that container is to be seen. A copy that appears after it was
    /// "undone" would run beside its source. What can be seen is the file that Podman keeps the archive
    /// in until it has answered.
    async fn restores_ended(&self, since: SystemTime) {
        const LOOK_AGAIN: Duration = Duration::from_millis(50);
        // A file that stays for longer was left by a Podman that died.
        let longest = self.config.unwanted_restore_timeout;
        let began = Instant::now();
        while remains::restore_under_way(since) && began.elapsed() < longest {
            // Where Podman is started by whoever asks: then the file is seen to be older than it.
            let _ = self.podman.host().await;
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Has somebody's answer to whether the container runs there, or goes on asking for so long.
    pub async fn runs_at(
        &self,
        peer: &str,
        migration: &MigrationId,
        patience: Duration,
    ) -> Result<bool> {
        let began = Instant::now();
        loop {
            match self.status_at(peer, migration).await {
                Ok(Status { stage, .. }) => return Ok(stage == Stage::Running),
                Err(error) if began.elapsed() >= patience => return Err(error),
                Err(error) => tracing::debug!(%error, peer, "no answer yet; asking again"),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Asks somebody once where a migration stands.
    pub async fn status_at(&self, peer: &str, migration: &MigrationId) -> Result<Status> {
        let path = format!("/v1/migrations/{migration}");
        ask(&self.config, peer, Method::GET, &path).await
    }

    /// Tells the destination that the container is its own.
    pub async fn hand_over(&self, peer: &str, migration: &MigrationId) -> Result<()> {
        let path = format!("/v1/migrations/{migration}/commit");
        let Nothing {} = ask(&self.config, peer, Method::POST, &path).await?;
        Ok(())
    }

    /// Undoes one effect. What is not there any more, or never was, is no error.
    pub async fn undo(&mut self, effect: &Effect) -> Result<(), UndoError> {
        tracing::debug!(%effect, "undoing");
        match effect {
            Effect::Hop { user } => Ok(leave_hop(&self.config, user).await?),
            Effect::Forget { .. } => Ok(()),
            Effect::Destination {
                peer,
                migration,
                asked,
            } => self.give_up(peer, migration, *asked).await,
            Effect::Hold { spec } => {
                let of_it = |hold: &Hold| hold.spec().queue == spec.queue;
                let released = match self.holds.iter().position(of_it) {
                    Some(place) => {
                        let hold = self.holds.swap_remove(place);
                        let_go_home(hold, self.namespace.clone()).await
                    }
                    None => Ok(()),
                };
                // Whatever became of the packets that waited: others must not.
                conntrack::hold::remove_rules(spec).await?;
                Ok(released?)
            }
            Effect::Fenced { fence } => Ok(fence.remove().await?),
            Effect::Forwarding { container, before } => {
                Ok(forwarding::restore(&self.config, container, before.as_ref()).await?)
            }
            Effect::Closed { gate } => Ok(gate.remove().await?),
            Effect::Frozen { freezer } => {
                let freezer = freezer.clone();
                Ok(blocking(move || freezer.thaw()).await?)
            }
            Effect::Rounds { container, freezer } => {
                self.round_ended(container).await;
                let freezer = freezer.clone();
                Ok(blocking(move || freezer.thaw()).await?)
            }
            Effect::Steered { addresses, hop } => Ok(clear_marks(addresses, *hop).await?),
            Effect::Network { name } => Ok(self.podman.remove_network(name).await.map(|_| ())?),
            Effect::Image { id } => Ok(self.podman.remove_image(id).await.map(|_| ())?),
            Effect::Flows { addresses, hop } => Ok(delete_flows(addresses, *hop).await?),
            Effect::Path {
                end,
                addresses,
                from,
                to,
            } => Ok(take_back(*end, addresses, *from, *to).await?),
            Effect::PathAsked { peer, path } => {
                let path = format!("/v1/paths/{path}/change");
                let Nothing {} = ask(&self.config, peer, Method::DELETE, &path).await?;
                Ok(())
            }
            Effect::Staging { directory } => Ok(remove_staging(directory)?),
            Effect::CameHome { addresses, hop } => Ok(send_away(addresses, *hop).await?),
            Effect::Restored {
                container,
                volumes,
                ports,
            } => Ok(self.remove_copy(container, volumes, ports).await?),
        }
    }

    /// Makes the destination give up what it has prepared or restored.
    async fn give_up(
        &self,
        peer: &str,
        migration: &MigrationId,
        asked: Asked,
    ) -> Result<(), UndoError> {
        let began = Instant::now();
        // Whoever was only asked to prepare tidies up by itself when it hears nothing more.
        let patience = match asked {
            Asked::Restore if !self.kept_here => self.config.doubt_timeout,
            _ => self.config.give_up_timeout,
        };
        loop {
            let path = format!("/v1/migrations/{migration}");
            let error = match ask::<Undone>(&self.config, peer, Method::DELETE, &path).await {
                Ok(Undone { leftovers }) if leftovers.is_empty() => return Ok(()),
                Ok(Undone { leftovers }) => {
                    return Err(UndoError::Failed(Error::DestinationLeftovers {
                        peer: peer.to_owned(),
                        leftovers: leftovers.join("; "),
                    }));
                }
                Err(error) => error,
            };
            if began.elapsed() >= patience {
                return Err(match asked {
                    Asked::Restore if !self.kept_here => UndoError::InDoubt(peer.to_owned(), error),
                    // What the copy says is not heard here any more once its flows are unmarked, which
                    // is the next thing to be undone: the guard of the hop drops it.
                    _ => UndoError::Failed(error),
                });
            }
            tracing::debug!(%error, peer, "the destination does not answer; asking again");
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// The program that runs this host's containers.
    async fn runtime(&self) -> Result<PathBuf> {
        Ok(self.podman.host().await?.runtime.path)
    }

    /// Ends what is left of a container that Podman does not know.
    async fn end_remains(&self, container: &ContainerId) -> Result<()> {
        let within = self.config.ending_timeout;
        remains::end(container, &self.runtime().await?, within).await;
        Ok(())
    }

    /// Removes a restored container and the volumes that came with it.
    async fn remove_copy(
        &self,
        container: &ContainerId,
        volumes: &[String],
        ports: &[PublishedPort],
    ) -> Result<()> {
        let options = RemoveOptions {
            force: true,
            timeout: Some(Duration::ZERO),
            volumes: true,
        };
        // Of a Podman that has died, and not known to the one that lives.
        if remains::restore_goes_on(container) {
            self.end_remains(container).await?;
        }
        // Its sockets die with it, and what they say then would end the connections that go on at the
        // source, or have them taken for ended there.
        let addresses = match self.podman.inspect(container.as_str()).await {
            Ok(copy) => copy.addresses().collect(),
            // It is not there, or so little of it that it cannot be looked at (its storage is gone, or
            // was never made): it has no sockets.
            Err(podman::Error::NotFound { .. } | podman::Error::Refused { .. }) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let fence = Fence {
            container: container.clone(),
            addresses,
            ports: Vec::new(),
        };
        if !fence.addresses.is_empty()
            && let Err(error) = quiet(&fence).await
        {
            // A connection that ends is less than a container that runs twice.
            tracing::warn!(%container, %error, "the copy may be heard when it ends");
        }
        // The first time Podman may stumble over what is not there any more (the network namespace of a
        // container whose state could not be written), which it then knows.
        if let Err(podman::Error::Refused { message, .. }) =
            self.podman.remove(container, options).await
        {
            tracing::debug!(%container, message, "once more");
            self.podman.remove(container, options).await?;
        }
        if remains::are_there(container) {
            self.end_remains(container).await?;
        }
        fence.remove().await?;
        for volume in volumes {
            self.podman.remove_volume(volume).await?;
        }
        // After a restore that failed, Podman's service holds them for minutes, in the way of the
        // next attempt.
        let free = || ports.iter().all(|port| port.is_free().unwrap_or(true));
        if !self.podman.free_leaked_ports(free).await? {
            tracing::warn!(%container, "its published ports are not free yet");
        }
        Ok(())
    }
}

/// Removes a container's memory that was on its way.
pub(crate) fn remove_staging(directory: &Path) -> Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("remove", directory)(error))
        }
        _ => Ok(()),
    }
}

/// Lets the packets go on to the container here, as its sockets take them.
async fn let_go_home(hold: Hold, container: Option<Namespace>) -> conntrack::Result<()> {
    let pace = container.map_or(Pace::Unpaced, Pace::Sockets);
    let released = hold.release(To::Source, pace).await?;
    released.clear().await.map(|_| ())
}

async fn quiet(fence: &Fence) -> conntrack::Result<()> {
    fence.prepare().await?;
    fence.install()
}

/// Gives back a share in a hop; the last one takes the hop down.
pub(crate) async fn leave_hop(config: &Config, user: &str) -> Result<()> {
    let tunnels = tunnels(config);
    tunnels.registry().forget(user)?;
    // Also one that somebody forgot, and died before it was down.
    for hop in tunnels
        .registry()
        .list()?
        .into_iter()
        .filter(|hop| hop.users.is_empty())
    {
        // Somebody else may have taken a share meanwhile.
        if tunnels.down_if_unused(&hop.spec).await? {
            steer::remove(hop.spec.hop).await?;
        }
    }
    Ok(())
}

/// Removes the hops that no migration and no connection needs any more.
///
/// A migration leaves its hop to the connections that it moved. The kernel forgets a connection some
/// time after its end, so that also its last packets find their way. Says whether hops are left.
pub(crate) async fn leave_idle_hops(config: &Config) -> Result<bool> {
    let tunnels = tunnels(config);
    // In this order. A migration begins its journal before it takes a hop, and closes it after its
    // connections are marked: one without a journal has done either everything or nothing.
    let hops = tunnels.registry().list()?;
    if hops.is_empty() {
        return Ok(false);
    }
    let under_way = under_way(config)?;
    let entries = Table::open(&Namespace::current()?)?
        .dump(Family::Both)
        .await?;
    alias::forget_unused(&entries)?;
    for hop in hops {
        let id = hop.spec.hop;
        if entries.iter().any(|entry| entry.mark.uses(id)) {
            continue;
        }
        for user in hop.users.difference(&under_way) {
            // Others than migrations know by themselves when they are done with it.
            if user.parse::<MigrationId>().is_ok() && tunnels.registry().release(id, user)? {
                tracing::debug!(hop = %id, "no connection uses it any more");
                leave_hop(config, user).await?;
            }
        }
    }
    Ok(!tunnels.registry().list()?.is_empty())
}

/// Clears this hop from the marks of a container's flows.
async fn clear_marks(addresses: &[IpAddr], hop: HopId) -> Result<()> {
    let mut flows = flows::of(addresses).await?;
    flows.retain(|flow| flow.goes_by() == Some(hop));
    flows::mark_all(flows.iter().map(|flow| flow.steered(None)).collect()).await?;
    let table = Table::open(&Namespace::current()?)?;
    Ok(alias::forget_unused(&table.dump(Family::Both).await?)?)
}

/// Sends a container's flows by the hop again that they took before.
async fn take_back(end: End, addresses: &[IpAddr], from: HopId, to: HopId) -> Result<()> {
    let flows = flows::of(addresses).await?;
    let marks = flows.iter().filter_map(|flow| match end {
        End::Anchor if flow.goes_by() == Some(to) => Some(flow.steered(Some(from))),
        End::Container if flow.came_by() == Some(to) => Some(flow.answering(from)),
        _ => None,
    });
    flows::mark_all(marks.collect()).await
}

/// Deletes the flows that were inserted for a container that came, or was to come, through a hop.
async fn delete_flows(addresses: &[IpAddr], hop: HopId) -> Result<()> {
    // By the way back: what began here and was sent away by the same hop is not meant.
    let mut flows = flows::of(addresses).await?;
    flows.retain(|flow| flow.came_by() == Some(hop));
    flows::forget(&flows).await
}

/// Asks the agent of a host, over a connection of its own.
async fn ask<T: DeserializeOwned>(
    config: &Config,
    name: &str,
    method: Method,
    path: &str,
) -> Result<T> {
    let mut connection = connect(config, &peer(config, name)?).await?;
    Ok(connection.call(method, path, &Nothing {}).await?)
}

/// Runs what blocks on a thread where it may.
pub(crate) async fn blocking<T: Send + 'static, E: Send + 'static>(
    call: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
