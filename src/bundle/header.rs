//! What has to be known before the rest of a stream: one JSON value in front of it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt, TryStreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Error, Result};

/// The longest header, in bytes: some hundred thousand flows.
const LONGEST: usize = 64 << 20;
/// In front of the header: its length in bytes, big-endian.
const LENGTH: usize = size_of::<u32>();

/// Puts a header in front of a stream.
///
/// # Errors
/// [`Error::Header`] if the value cannot be written as JSON, or is too long.
pub fn headed<T, S, E>(
    header: &T,
    rest: S,
) -> Result<impl Stream<Item = Result<Bytes>> + Send + use<T, S, E>>
where
    T: Serialize + ?Sized,
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: std::error::Error + Send + Sync + 'static,
{
    let json = serde_json::to_vec(header).map_err(|e| Error::Header(e.to_string()))?;
    let length = u32::try_from(json.len())
        .ok()
        .filter(|length| *length as usize <= LONGEST);
    let length =
        length.ok_or_else(|| Error::Header(format!("it is longer than {LONGEST} bytes")))?;
    let mut front = BytesMut::with_capacity(LENGTH + json.len());
    front.put_u32(length);
    front.put_slice(&json);
    let front = stream::once(async move { Ok(front.freeze()) });
    Ok(front.chain(rest.map_err(|e| Error::Upstream(Box::new(e)))))
}

/// Takes the header off a stream.
///
/// # Errors
/// [`Error::Header`] if there is none, or not one of this type; those of the stream.
pub async fn beheaded<T, S>(stream: S) -> Result<(T, BoxStream<'static, Result<Bytes>>)>
where
    T: DeserializeOwned,
    S: Stream<Item = Result<Bytes>> + Send + 'static,
{
    let mut stream = stream.boxed();
    let mut read = BytesMut::new();
    fill(&mut stream, &mut read, LENGTH).await?;
    let length = read.get_u32() as usize;
    if length > LONGEST {
        return Err(Error::Header(format!(
            "it is said to have {length} bytes, more than {LONGEST}"
        )));
    }
    fill(&mut stream, &mut read, length).await?;
    let json = read.split_to(length);
    let header = serde_json::from_slice(&json).map_err(|e| Error::Header(e.to_string()))?;
    let rest = read.freeze();
    let rest = stream::iter((!rest.is_empty()).then_some(Ok(rest)));
    Ok((header, rest.chain(stream).boxed()))
}

async fn fill(
    stream: &mut BoxStream<'static, Result<Bytes>>,
    read: &mut BytesMut,
    wanted: usize,
) -> Result<()> {
    while read.len() < wanted {
        let Some(piece) = stream.try_next().await? else {
            return Err(Error::Header(
                "the stream ends in the middle of it".to_owned(),
            ));
        };
        read.extend_from_slice(&piece);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn comes_off_as_it_was_put_on(words: Vec<String>, rest: Vec<u8>, cut in 1usize..64) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let body = stream::iter([Ok::<_, Error>(Bytes::from(rest.clone()))]);
                let whole: Vec<Bytes> = headed(&words, body).unwrap().try_collect().await.unwrap();
                let pieces: Vec<Result<Bytes>> = whole.concat().chunks(cut).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
                let (header, stream): (Vec<String>, _) = beheaded(stream::iter(pieces)).await.unwrap();
                let left: Vec<Bytes> = stream.try_collect().await.unwrap();
                assert_eq!(header, words);
                assert_eq!(left.concat(), rest);
            });
        }
    }

    #[tokio::test]
    async fn a_cut_or_absurd_one_is_refused() {
        for bytes in [
            &b"\0\0"[..],
            b"\0\0\0\x05[]",
            b"\xff\xff\xff\xff[]",
            b"\0\0\0\x02{}",
        ] {
            let stream = stream::iter([Ok(Bytes::copy_from_slice(bytes))]);
            assert!(matches!(
                beheaded::<Vec<String>, _>(stream).await,
                Err(Error::Header(_))
            ));
        }
    }
}
