//! Everything that can be done before the container is frozen.
//!
//! The tunnel comes up on both sides and has to carry a handshake; the networks are made and the image
//! is sent if they are missing. What fails here has cost the container nothing.

use std::sync::{Arc, Mutex, PoisonError};

use async_compression::tokio::bufread::ZstdEncoder;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use hyper::{HeaderMap, Method};
use tokio_util::io::{ReaderStream, StreamReader};

use super::{Asked, Cargo, Effect, Engine, Event, Migration, forwarding, hop, shell};
use crate::agent::protocol::{IMAGE_PIECE, Nothing, Prepare, Prepared};
use crate::podman::{Container, Network};
use crate::{Error, Result};

pub(super) async fn prepare(migration: &mut Migration<'_>) -> Result<()> {
    open_hop(migration).await?;
    if !migration.preflight.assessment.image_present {
        send_image(migration).await?;
    }
    match migration.preflight.engine {
        Engine::Rest => Ok(()),
        Engine::Direct => shell::take(migration).await,
    }
}

/// The largest packet that a container's networks carry, in bytes.
pub(crate) fn mtu(networks: &[Network]) -> u16 {
    /// What Ethernet, and so Podman's bridges, have unless told otherwise.
    const ETHERNET: u16 = 1500;
    networks
        .iter()
        .filter_map(Network::mtu)
        .max()
        .unwrap_or(ETHERNET)
}

/// Makes both ends of the hop, and waits until they have shaken hands.
async fn open_hop(migration: &mut Migration<'_>) -> Result<()> {
    let config = &migration.request.config;
    let user = migration.id.as_str();
    migration.journal.will([Effect::Hop {
        user: user.to_owned(),
    }])?;
    let mtu = mtu(&migration.preflight.offer.networks);
    let own = hop::open(config, &migration.peer.lasting(), user, mtu).await?;
    migration.hop = Some(own.hop);

    let destination = migration.request.to.clone();
    migration.journal.will([Effect::Destination {
        peer: destination,
        migration: migration.id.clone(),
        asked: Asked::Prepare,
    }])?;
    let ask = Prepare {
        offer: migration.preflight.offer.clone(),
        hop: own.proposal,
        post_copy: migration.request.post_copy,
        forward: migration.request.forward_new
            || forwarding::comes_from_others(config, &migration.preflight.container, own.hop)?,
    };
    let path = format!("/v1/migrations/{}", migration.id);
    let prepared: Prepared = migration
        .connection
        .call(Method::POST, &path, &ask)
        .await
        .map_err(Error::of_host(&migration.request.to))?;
    migration.comes_home = prepared.home;

    let address = migration.connection.peer_addr().ip();
    hop::connect(config, own.hop, &prepared.hop, address).await?;
    let probe = format!("{path}/probe");
    hop::verify(config, own.hop, &mut migration.connection, &probe).await
}

/// Sends the container's image, compressed, as this host has it.
async fn send_image(migration: &mut Migration<'_>) -> Result<()> {
    let container: &Container = &migration.preflight.container;
    let image = container.image.clone().ok_or(Error::OutOfOrder("image"))?;
    let size = migration
        .hands
        .podman
        .image(image.as_str())
        .await?
        .map(|image| image.size);
    let archive = migration.hands.podman.export_image(&image).await?;
    let plain = StreamReader::new(archive.map_err(std::io::Error::other));
    let packed = ReaderStream::with_capacity(ZstdEncoder::new(plain), IMAGE_PIECE);

    let sent = Arc::new(Mutex::new(0));
    let count = sent.clone();
    let (progress, mut told) = tokio::sync::watch::channel(0);
    let body = packed.inspect(move |piece: &std::io::Result<Bytes>| {
        if let Ok(piece) = piece {
            let mut sent = count.lock().unwrap_or_else(PoisonError::into_inner);
            *sent += piece.len() as u64;
            // Nobody listens any more when the call has ended.
            let _ = progress.send(*sent);
        }
    });
    let path = format!("/v1/migrations/{}/image", migration.id);
    let within = migration.request.config.image_timeout;
    let call = migration
        .connection
        .send_stream(Method::PUT, &path, HeaderMap::new(), body, within);
    let mut call = std::pin::pin!(call);
    let cancel = migration.request.cancel.clone();
    let Nothing {} = loop {
        tokio::select! {
            answer = &mut call => break answer.map_err(Error::of_host(&migration.request.to))?,
            Ok(()) = told.changed() => {
                let bytes = *told.borrow_and_update();
                migration.clock.observer.observe(Event::Sent { what: Cargo::Image, bytes, total: size });
            }
            () = cancel.cancelled() => return Err(Error::Interrupted(migration.clock.phase())),
        }
    };
    migration.bytes_sent += *sent.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(())
}
