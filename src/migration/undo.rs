//! Undoing what the journal names.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use hyper::Method;

use super::effect::{Asked, Effect};
use super::event::{Event, Observer};
use super::journal::Journal;
use super::preflight::{connect, peer};
use super::prepare::tunnels;
use super::report::Leftover;
use crate::agent::protocol::{MigrationId, Nothing, Undone};
use crate::conntrack::hold::{Hold, To};
use crate::conntrack::{self, Table, steer};
use crate::netlink::Namespace;
use crate::podman::{Client, ContainerId, PublishedPort, RemoveOptions};
use crate::tunnel::HopId;
use crate::{Config, Error, Result};

/// How long the destination is asked to give up its copy before the migration is called in doubt. A
/// restarted agent answers within seconds.
const ASKED_FOR: Duration = Duration::from_secs(60);
/// How long to wait before asking again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What undoing needs that a journal cannot hold.
#[derive(Debug)]
pub(crate) struct Hands {
    pub config: Config,
    pub podman: Client,
    /// The hold, while this process has it. After a crash there is none, and only its rules are left.
    pub hold: Option<Hold>,
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
    for effect in journal.effects().iter().rev() {
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
    Ok(leftovers)
}

impl Hands {
    pub fn new(config: Config, podman: Client) -> Hands {
        Hands {
            config,
            podman,
            hold: None,
        }
    }

    /// Undoes one effect. What is not there any more, or never was, is no error.
    pub async fn undo(&mut self, effect: &Effect) -> Result<(), UndoError> {
        tracing::debug!(%effect, "undoing");
        match effect {
            Effect::Hop { user } => Ok(leave_hop(&self.config, user).await?),
            // Past the point of no return nothing is undone.
            Effect::Forget { .. } => Ok(()),
            Effect::Destination {
                peer,
                migration,
                asked,
            } => self.give_up(peer, migration, *asked).await,
            Effect::Hold { spec } => {
                if let Some(hold) = self.hold.take() {
                    hold.release(To::Source).await?;
                }
                Ok(conntrack::hold::remove_rules(spec).await?)
            }
            Effect::Fenced { fence } => Ok(fence.remove().await?),
            Effect::Frozen { freezer } => {
                let freezer = freezer.clone();
                Ok(blocking(move || freezer.thaw()).await?)
            }
            Effect::Steered { addresses, hop } => Ok(clear_marks(addresses, *hop).await?),
            Effect::Network { name } => Ok(self.podman.remove_network(name).await.map(|_| ())?),
            Effect::Image { id } => Ok(self.podman.remove_image(id).await.map(|_| ())?),
            Effect::Flows { addresses, hop } => Ok(delete_flows(addresses, *hop).await?),
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
            Asked::Prepare => Duration::from_secs(5),
            Asked::Restore => ASKED_FOR,
        };
        loop {
            let error = match ask_to_give_up(&self.config, peer, migration).await {
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
                    Asked::Prepare => UndoError::Failed(error),
                    Asked::Restore => UndoError::InDoubt(peer.to_owned(), error),
                });
            }
            tracing::debug!(%error, peer, "the destination does not answer; asking again");
            tokio::time::sleep(ASK_AGAIN).await;
        }
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
        self.podman.remove(container, options).await?;
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

/// Clears this hop from the marks of a container's flows.
async fn clear_marks(addresses: &[IpAddr], hop: HopId) -> Result<()> {
    let table = Table::open(&Namespace::current()?)?;
    for address in addresses {
        let entries = table.dump_container(*address).await?;
        for flow in entries.iter().filter_map(|entry| entry.flow_of(*address)) {
            if flow.entry.mark.hop(flow.towards_container()) == Some(hop) {
                let (mark, mask) = flow.steering(None);
                unless_gone(table.set_mark(&flow.entry.original, mark, mask).await)?;
            }
        }
    }
    Ok(())
}

/// Deletes the flows that were inserted for a container that came, or was to come, through a hop.
async fn delete_flows(addresses: &[IpAddr], hop: HopId) -> Result<()> {
    let table = Table::open(&Namespace::current()?)?;
    for address in addresses {
        for entry in table.dump_container(*address).await? {
            if entry.mark.uses(hop) {
                unless_gone(table.delete(&entry.original).await)?;
            }
        }
    }
    Ok(())
}

/// A connection may end at any moment.
fn unless_gone(result: conntrack::Result<()>) -> conntrack::Result<()> {
    match result {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}

async fn ask_to_give_up(config: &Config, name: &str, migration: &MigrationId) -> Result<Undone> {
    let mut connection = connect(config, &peer(config, name)?).await?;
    Ok(connection
        .call(
            Method::DELETE,
            &format!("/v1/migrations/{migration}"),
            &Nothing {},
        )
        .await?)
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
