package main

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log"
	"log/slog"

	"github.com/keyturn/keyturn/clients/go"
)

type options struct {
	Target           string   `json:"target"`
	Token            *string  `json:"token"`
	RootCertificates string   `json:"root_certificates"`
	CertificateChain string   `json:"certificate_chain"`
	PrivateKey       string   `json:"private_key"`
	TLS              bool     `json:"tls"`
	TimeoutMS        *float64 `json:"timeout_ms"`
	Retries          struct {
		Attempts     *int     `json:"attempts"`
		FirstDelayMS *float64 `json:"first_delay_ms"`
		MaxDelayMS   *float64 `json:"max_delay_ms"`
	} `json:"retries"`
	QueueSize      int      `json:"queue_size"`
	CloseTimeoutMS *float64 `json:"close_timeout_ms"`
	WhenDown       string   `json:"when_down"`
}

type request struct {
	RequestID       string   `json:"request_id"`
	UserID          string   `json:"user_id"`
	Provider        string   `json:"provider"`
	Model           string   `json:"model"`
	ServiceType     string   `json:"service_type"`
	CostMicros      *int64   `json:"cost_micros"`
	InputTokens     *int64   `json:"input_tokens"`
	MaxOutputTokens *int64   `json:"max_output_tokens"`
	Constraint      string   `json:"constraint"`
	FailedKeys      []string `json:"failed_keys"`
	Redeem          bool     `json:"redeem"`
	HoldTTLMS       *float64 `json:"hold_ttl_ms"`
}

func (r request) value() keyturn.DecideRequest {
	return keyturn.DecideRequest{
		RequestID: r.RequestID, UserID: r.UserID, Provider: r.Provider, Model: r.Model, ServiceType: r.ServiceType,
		CostMicros: r.CostMicros, InputTokens: r.InputTokens, MaxOutputTokens: r.MaxOutputTokens,
		Constraint: constraints[r.Constraint], FailedKeys: each(r.FailedKeys, keyturn.NewSealedHandle), Redeem: r.Redeem,
		HoldTTL: spanOrZero(r.HoldTTLMS),
	}
}

var constraints = map[string]keyturn.Constraint{
	"ANY": keyturn.ConstraintAny, "OWN_KEY_ONLY": keyturn.ConstraintOwnKeyOnly, "CREDITS_ONLY": keyturn.ConstraintCreditsOnly,
}

type record struct {
	Decision       string          `json:"decision"`
	Handle         string          `json:"handle"`
	Ticket         string          `json:"ticket"`
	Outcome        json.RawMessage `json:"outcome"`
	Usage          *usage          `json:"usage"`
	CostMicros     *int64          `json:"cost_micros"`
	Model          string          `json:"model"`
	Endpoint       string          `json:"endpoint"`
	ResponseTimeMS *float64        `json:"response_time_ms"`
	HTTPStatus     int             `json:"http_status"`
	ErrorMessage   string          `json:"error_message"`
	RetryAfterMS   *float64        `json:"retry_after_ms"`
}

// usage has the fields of keyturn.Usage, under the names of the protocol.
type usage struct {
	InputTokens      *int64 `json:"input_tokens"`
	OutputTokens     *int64 `json:"output_tokens"`
	CacheReadTokens  *int64 `json:"cache_read_tokens"`
	CacheWriteTokens *int64 `json:"cache_write_tokens"`
	TotalTokens      *int64 `json:"total_tokens"`
}

func (d *driver) show(c command) (any, error) {
	d.mu.Lock()
	value, ok := d.kept[c.Of]
	d.mu.Unlock()
	if !ok {
		return nil, defect("nothing was kept as " + c.Of)
	}
	return map[string]any{"prints": prints(value), "revealed": revealed(value, c.Secret)}, nil
}

func revealed(value any, secret string) bool {
	switch value := value.(type) {
	case keyturn.Secret:
		return value.Reveal() == secret
	case *keyturn.Decision:
		return value.Key != nil && value.Key.Secret != nil && value.Key.Secret.Reveal() == secret
	case *keyturn.Call:
		return revealed(value.Decision(), secret)
	}
	return false
}

// prints is a value in every way that Go prints one: by itself, and in a field that fmt reads without asking it.
func prints(value any) []string {
	var texts []string
	for _, printed := range []any{value, struct{ Field any }{value}, struct{ field any }{value}, dereferenced(value)} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%p", "%t"} {
			texts = append(texts, fmt.Sprintf(verb, printed))
		}
		for _, marshal := range []func(any) ([]byte, error){json.Marshal, xml.Marshal, byGob} {
			marshaled, err := marshal(printed)
			texts = append(texts, string(marshaled), fmt.Sprint(err))
		}
		var logged bytes.Buffer
		slog.New(slog.NewTextHandler(&logged, nil)).Info("shown", "value", printed)
		slog.New(slog.NewJSONHandler(&logged, nil)).Info("shown", "value", printed)
		log.New(&logged, "", 0).Print(printed)
		texts = append(texts, logged.String())
	}
	return texts
}

// dereferenced is what a pointer to plain values points to, since %v stops at pointers that are inside.
func dereferenced(value any) any {
	switch value := value.(type) {
	case *keyturn.Decision:
		if value.Key != nil {
			return struct {
				decision keyturn.Decision
				key      keyturn.KeyHandle
			}{*value, *value.Key}
		}
		if value.Ticket != nil {
			return struct {
				decision keyturn.Decision
				ticket   keyturn.CreditTicket
			}{*value, *value.Ticket}
		}
		return *value
	case *keyturn.Call:
		return dereferenced(value.Decision())
	}
	return value
}

func byGob(value any) ([]byte, error) {
	var encoded bytes.Buffer
	err := gob.NewEncoder(&encoded).Encode(value)
	return encoded.Bytes(), err
}
