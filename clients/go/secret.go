package keyturn

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// A Secret is a text that shows itself as Secret(***), however it is printed, logged or marshaled; Reveal is the
// one way out. It cannot be compared with == nor be the key of a map: Equal compares in constant time.
//
// The zero Secret holds the empty text.
type Secret struct {
	// A closure: fmt and the printers that dig deeper read unexported fields, but none reads what a func holds.
	text func() string
}

const hidden = "Secret(***)"

// NewSecret makes a secret of a text.
func NewSecret(text string) Secret {
	return Secret{text: func() string { return text }}
}

// Reveal returns the text itself. Search for .Reveal( to find every place that sees it.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return s.text()
}

// Equal reports whether both hold the same text, in a time that tells nothing of it but its length.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// Format writes Secret(***) for every verb.
func (Secret) Format(state fmt.State, _ rune) { write(state, hidden) }

// String returns Secret(***).
func (Secret) String() string { return hidden }

// GoString returns Secret(***).
func (Secret) GoString() string { return hidden }

// MarshalText returns Secret(***), for encoding/json too.
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// LogValue returns Secret(***).
func (Secret) LogValue() slog.Value { return slog.StringValue(hidden) }

// A SealedHandle is the text of a key handle: opaque, good for Record, Redeem and DecideRequest.FailedKeys. It
// prints as its first characters; Text is the way to store it.
type SealedHandle struct{ sealed }

// A SealedTicket is the text of a credit ticket: opaque, good for Record. It prints as its first characters; Text is
// the way to store it.
type SealedTicket struct{ sealed }

// NewSealedHandle makes a handle again of a text that was stored.
func NewSealedHandle(text string) SealedHandle {
	return SealedHandle{sealed{kind: "SealedHandle", secret: NewSecret(text)}}
}

// NewSealedTicket makes a ticket again of a text that was stored.
func NewSealedTicket(text string) SealedTicket {
	return SealedTicket{sealed{kind: "SealedTicket", secret: NewSecret(text)}}
}

// sealed is an opaque token of the sidecar. Whoever has it can record with it, or redeem a secret.
type sealed struct {
	kind   string
	secret Secret
}

// Text returns the whole token, to be sent or stored. Never log it.
func (s sealed) Text() string { return s.secret.Reveal() }

// String returns the kind and the first 8 characters.
func (s sealed) String() string {
	shown := ""
	if text := s.Text(); len(text) >= 32 {
		shown = text[:8]
	}
	return s.kind + "(" + shown + "…)"
}

// Format writes what String returns, for every verb.
func (s sealed) Format(state fmt.State, _ rune) { write(state, s.String()) }

// GoString returns what String returns.
func (s sealed) GoString() string { return s.String() }

// MarshalText returns what String returns, for encoding/json too.
func (s sealed) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue returns what String returns.
func (s sealed) LogValue() slog.Value { return slog.StringValue(s.String()) }

func write(state fmt.State, text string) {
	_, _ = io.WriteString(state, text) // fmt gathers it in memory
}
