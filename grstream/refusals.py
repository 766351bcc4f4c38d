"""Why a Kafka broker and a client do not accept each other, and what to check: never with a secret in it."""

import ssl

import kafka.errors

from grstream.config import KAFKA_PASSWORD_VARIABLE, KafkaSecurityConfig


class Refused(kafka.errors.KafkaError):
    """What will not pass by trying again. The one argument is for people."""

    def __str__(self) -> str:
        return str(self.args[0])


# kafka-python's errors that are one, by their class alone.
REFUSALS = (
    Refused,
    kafka.errors.SaslAuthenticationFailedError,
    kafka.errors.UnsupportedSaslMechanismError,
    kafka.errors.IllegalSaslStateError,
)
# X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_WRONG_HOST = (62, 64)
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")


def refusal(error: BaseException, config: KafkaSecurityConfig) -> str | None:
    """What to tell of an error of kafka-python's; None where it is none of authentication or TLS."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, kafka.errors.SaslAuthenticationFailedError):
        return f"{config.mechanism} {_who(config)} ({_words(error)})"
    if isinstance(error, REFUSALS):
        return (
            f"{config.mechanism} is not spoken there; check kafka.security.mechanism, and that the listener "
            f"at kafka.bootstrap_servers is {config.protocol} ({_words(error)})"
        )
    tls = next((e for e in (error.__context__, *error.args) if isinstance(e, ssl.SSLError)), None)
    return None if tls is None else _of_tls(tls)


def _of_tls(error: ssl.SSLError) -> str | None:
    reason = getattr(error, "reason", None) or ""  # which those of Python's own making lack
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _WRONG_HOST:
            return (
                "its certificate is another host's; check kafka.bootstrap_servers, and the names in the "
                "certificate, which kafka.security.check_hostname: false leaves unchecked "
                f"({error.verify_message})"
            )
        return f"its certificate is not trusted; check kafka.security.ca_file ({error.verify_message})"
    if "ALERT" in reason:
        return (
            "it ended the TLS handshake; check kafka.security.cert_file and key_file: brokers may want a "
            f"certificate, of an authority that they know ({reason})"
        )
    if reason in _NO_TLS:
        return f"it does not speak TLS; check kafka.bootstrap_servers and kafka.security.protocol ({reason})"
    return None


def _who(config: KafkaSecurityConfig) -> str:
    if config.oauth:
        return (
            f"with a token of client {config.oauth.client_id!r} was refused; check kafka.security.oauth, and "
            "that brokers accept the tokens of its token_url"
        )
    source = config.password_file or KAFKA_PASSWORD_VARIABLE
    return f"as {config.username!r} was refused; check kafka.security.username and the password in {source}"


def _words(error: kafka.errors.KafkaError) -> str:
    name = type(error).__name__
    return str(error.args[0]).removeprefix(f"{name}: ") if error.args else name
